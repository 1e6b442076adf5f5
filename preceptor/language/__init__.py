"""One way to talk to a language model: a local one, any OpenAI-compatible endpoint, or a script.

    from preceptor.language import ChatSettings, Request, open_chat

    chat = open_chat(ChatSettings(model="smollm2", cache="answers.sqlite"))
    questions = ["What is a prime number?", "Name three primes."]
    requests = [Request(({"role": "user", "content": question},), max_tokens=32) for question in questions]
    replies = chat.ask(requests)
    for question, reply in zip(questions, replies):
        print(question, reply.error or reply.text, reply.completion_tokens)
    print(chat.spent)

The second run of these lines makes no call: every answer is in the cache.
"""

from __future__ import annotations

from preceptor.data.readers import Message
from preceptor.language.chat import Chat, Estimate
from preceptor.language.endpoint import Endpoint
from preceptor.language.gate import Scorer
from preceptor.language.limits import Budget, Limits, Spent
from preceptor.language.messages import Answer, Backend, CallFailed, Reply, Request
from preceptor.language.scripted import Echo, Scripted
from preceptor.language.settings import ChatSettings, open_chat

__all__ = [
    "Answer",
    "Backend",
    "Budget",
    "CallFailed",
    "Chat",
    "ChatSettings",
    "Echo",
    "Endpoint",
    "Estimate",
    "Limits",
    "Message",
    "Reply",
    "Request",
    "Scorer",
    "Scripted",
    "Spent",
    "open_chat",
]
