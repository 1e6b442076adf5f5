"""A few tutoring dialogues of our own, in MathDial's form: for tests, a first try, and `preceptor chat`."""

from __future__ import annotations

from preceptor.dialogue.dialogue import Dialogue, parse_turn
from preceptor.dialogue.tutors import NAMES, persona

# Problem / worked solution / wrong solution / difficulty / turns, teacher first.
_TEXT = """
A box holds 12 eggs. A baker buys 5 boxes and breaks 7 eggs on the way. How many whole eggs does she have?
5 boxes hold 5 * 12 = 60 eggs.\\nShe breaks 7, so 60 - 7 = 53 are whole.\\n 53
12 + 5 = 17 eggs.\\n17 - 7 = 10 eggs are whole.\\n 10
order
(generic)Hi, can you tell me how you solved it?
I added 12 and 5, which is 17, and took away the 7 broken ones. So 10.
(probing)How many eggs are in two boxes, and how do you know?
24, because each box has 12.
(focus)So how would you find the eggs in 5 boxes?
5 times 12, that is 60.
(focus)And what happened on the way?
7 broke, so 60 - 7 = 53 are whole.
(generic)Well done, that is it!
Thank you!
---
Tickets cost 8 dollars for an adult and 5 for a child. A family of 2 adults and 3 children pays with 50 dollars. How
 much change do they get?
The adults pay 2 * 8 = 16 dollars.\\nThe children pay 3 * 5 = 15 dollars.\\nThe change is 50 - 16 - 15 = 19.\\n 19
2 * 8 = 16 and 3 * 5 = 15.\\n16 + 15 = 31 dollars.\\n 31
question
(generic)Hello! Please walk me through your solution.
The adults pay 16 and the children 15, so it is 31 dollars.
(probing)What does the 31 stand for?
It is what they pay in all.
(focus)Read the last sentence of the problem again. What does it ask for?
How much change they get. Oh, so I need 50 - 31, which is 19 dollars.
(generic)Exactly, great that you found it yourself.
Thanks, bye!
---
A tank loses 3 litres of water an hour. After 6 hours 42 litres are left. How much was in it at first?
In 6 hours it loses 6 * 3 = 18 litres.\\nAt first there were 42 + 18 = 60 litres.\\n 60
6 * 3 = 18 litres are lost.\\n42 - 18 = 24 litres.\\n 24
ideas
(generic)Hi, tell me what you did, please.
18 litres are lost in 6 hours. 42 - 18 = 24, so it was 24.
(probing)Could a tank that loses water have had less at first than it has now?
No, it must have had more. But 42 - 18 is what I calculated.
(focus)When do we have the 42 litres, before or after the loss?
After it.
(telling)Right, so we must add what was lost: 42 + 18.
Then it is 60 litres.
(generic)Yes, that is right.
Okay, thank you.
---
Lena reads 15 pages a day from Monday to Friday and 20 a day at the weekend. Her book has 230 pages. How many pages are
 left after a week?
From Monday to Friday she reads 5 * 15 = 75 pages.\\nAt the weekend she reads 2 * 20 = 40.\\n230 - 75 - 40 = 115.\\n 115
5 * 15 = 75 pages.\\n75 + 20 = 95 pages.\\n230 - 95 = 135 pages are left.\\n 135
facts
(generic)Hi there, how did you get your answer?
75 pages in the week and 20 at the weekend make 95, so 135 are left.
(focus)How many days does a weekend have?
Two days.
(focus)How does this change the pages of the weekend?
She reads 20 on each day, so 40. Then 75 + 40 = 115 pages read, and 230 - 115 = 115 are left.
(probing)Nice. Why are both numbers the same?
Because she has read one half of the book.
---
A rope of 9 metres is cut into pieces of three quarters of a metre. How many pieces are there?
One divides: 9 / (3/4) = 12 pieces.\\n 12
9 * 3/4 = 6.75 pieces, that is 6.\\n 6
type
(generic)Hello, what was your idea?
I multiplied 9 by 3/4. It is 6.75, so there are 6 pieces.
(probing)If the pieces were one metre long, how many would there be?
9 pieces.
(probing)And shorter pieces, are there more of them or fewer?
More than 9. So 6 cannot be right.
(focus)What operation tells how often three quarters fit into 9?
A division: 9 divided by 3/4 is 12.
(generic)Perfect!
Great, thanks.
---
A shirt costs 40 dollars. It is first reduced by 10 percent and then by 5 dollars. What does it cost now?
10 percent of 40 are 4 dollars.\\n40 - 4 = 36 dollars.\\n36 - 5 = 31 dollars.\\n 31
40 - 10 = 30.\\n30 - 5 = 25 dollars.\\n 25
procedure
(generic)Hi! Could you explain your steps to me?
I took 10 off, and then 5. So it costs 25 dollars.
(probing)What do 10 percent mean?
10 out of every 100.
(focus)So how much are 10 percent of 40 dollars?
That is 4 dollars.
(telling)Then the first price is 40 - 4 = 36. What comes next?
36 - 5 is 31 dollars.
(generic)Right, good work.
Thank you for the help!
"""


def worked_dialogues() -> list[Dialogue]:
    """The dialogues, whole: problem, worked and wrong solution, persona, and turns with their moves."""
    return [_parse(block, name) for block, name in zip(_TEXT.strip().split("\n---\n"), NAMES)]


def _parse(block: str, name: str) -> Dialogue:
    problem, solution, wrong, difficulty, *texts = block.replace("\n ", " ").split("\n")
    turns = [parse_turn(text, "student" if place % 2 else "teacher") for place, text in enumerate(texts)]
    whole, mistaken = solution.replace("\\n", "\n"), wrong.replace("\\n", "\n")
    return Dialogue(problem, whole, mistaken, persona(name, difficulty), tuple(turns))
