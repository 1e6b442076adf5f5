"""One way to talk to a language model: a local one, any OpenAI-compatible endpoint, or a script.

from preceptor.language import ChatSettings, Request, open_chat

chat = open_chat(ChatSettings(model="smollm2", cache="answers.sqlite"))
questions = ["What is a prime number?", "Name three primes."]
replies = chat.ask([Request(({"role": "user", "content": question},)) for question in questions])
for reply in replies:
    print(reply.error or reply.text)
"""

from __future__ import annotations

from preceptor.language.chat import Chat
from preceptor.language.limits import Budget, Limits
from preceptor.language.messages import Answer, Backend, Message, Reply, Request
from preceptor.language.scripted import Echo, Scripted
from preceptor.language.settings import ChatSettings, open_chat

__all__ = [
    "Answer",
    "Backend",
    "Budget",
    "Chat",
    "ChatSettings",
    "Echo",
    "Limits",
    "Message",
    "Reply",
    "Request",
    "Scripted",
    "open_chat",
]
