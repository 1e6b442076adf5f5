"""Instruction prompts for a teacher to answer, written from task templates and topics: a start without any data.

The topics of the held-out prompts never occur in the training prompts. Every fifth entry of each list below is held
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product
from random import Random

from preceptor.errors import UserError


def _entries(text: str) -> tuple[str, ...]:
    """The entries of a list written with bars between them; line breaks count as spaces."""
    return tuple(" ".join(entry.split()) for entry in text.split("|"))


SUBJECTS = _entries(
    """
    volcanoes | the water cycle | black holes | photosynthesis | earthquakes | the solar system | rainbows | magnets
    | electricity | gravity | the human heart | vaccines | sleep | dreams | the immune system | digestion | muscles
    | bones | the brain | memory | honey bees | whales | penguins | spiders | bats | elephants | octopuses |
    dinosaurs | sharks | owls | the printing press | the steam engine | the telephone | the compass | paper | glass
    | bicycles | airplanes | submarines | trains | the Roman Empire | ancient Egypt | the Silk Road | the
    Renaissance | the Industrial Revolution | the Olympic Games | the Great Wall of China | Vikings | castles |
    pirates | democracy | taxes | inflation | insurance | banks | the stock market | trade | supply and demand |
    budgets | loans | computers | the internet | programming | search engines | passwords | robots | artificial
    intelligence | databases | encryption | video games | jazz | opera | painting | sculpture | poetry | theatre |
    photography | film | dance | architecture | deserts | rainforests | coral reefs | glaciers | rivers | islands |
    mountains | tides | clouds | the seasons | bread | cheese | chocolate | coffee | tea | rice | spices |
    fermentation | sugar | salt | football | chess | swimming | marathons | yoga | tennis | climbing | sailing |
    basketball | cycling | recycling | solar power | wind turbines | climate change | batteries | nuclear energy |
    compost | pollution | forests | endangered species | fractions | prime numbers | probability | statistics |
    geometry | algebra | calendars | maps | time zones | measurement | languages | alphabets | proverbs | libraries
    | museums | newspapers | schools | friendship | courage | honesty | kindness | curiosity | humour | bridges |
    clocks | mirrors | soap | lighthouses | fireworks | kites | umbrellas | plastic | steel | diamonds | fossils |
    mushrooms | seeds | roses | oak trees | bacteria | viruses | atoms | sound | light | heat | friction | rockets |
    satellites | telescopes | microscopes | thermometers
    """
)


ABOUT = _entries(
    """
    Explain {} to a ten-year-old child. | Explain {} in three sentences. | Write a short paragraph about {}. | List
    five facts about {}. | Why do people care about {}? Give two reasons. | What is a common misunderstanding about
    {}? | Write three questions that a curious student might ask about {}. | Describe {} to somebody who has never
    heard the word. | What are three important words to know when talking about {}? Define each of them. | Write a
    haiku about {}. | Give a title and an opening sentence for an article about {}. | How has what people know about
    {} changed over time? | Name three jobs that have to do with {}, and say what each one does. | Write a riddle
    whose answer is {}. | Plan a ten-minute lesson about {} for beginners. | Give one example from daily life that
    has to do with {}. | Summarise what you know about {} in one sentence. | What would the world be like without
    {}? | Write a short dialogue between a teacher and a student about {}. | Write a true-or-false quiz about {}
    with four statements and their answers. | Write a simple analogy that helps to understand {}. | What is the most
    surprising thing about {}? | Write a two-line advertisement for a book about {}. | What should a visitor look at
    first in an exhibition about {}?
    """
)


SKILLS = _entries(
    """
    learn to swim | save money | sleep better | cook a simple soup | grow tomatoes | prepare for a job interview |
    learn a new language | make new friends | write a clear email | speak in front of an audience | train a puppy |
    pack for a week of travel | stay calm before an exam | clean a kitchen quickly | start running | read more books
    | plan a birthday party | repair a flat tyre | take better photographs | remember names | organise a small desk
    | choose a gift | apologise to a friend | bake bread | keep houseplants alive | learn to play the guitar | drink
    more water | set up a study group | write a short poem | use less plastic | manage a busy week | give honest
    feedback | prepare a healthy breakfast | find a lost key | teach a child to read | work from home | welcome a
    new neighbour | prepare a presentation | draw a portrait | wake up early
    """
)


HOW_TO = (
    "How can I {}? Give step-by-step instructions.",
    "Give me four practical tips to {}.",
    "My friend wants to {} but keeps putting it off. What would you say to them?",
    "What mistakes do people often make when they try to {}?",
    "Write a one-week plan for somebody who wants to {}.",
    "What do I need before I {}? Answer with a short list.",
)


PAIRS = _entries(
    """
    cats and dogs | tea and coffee | cities and villages | books and films | trains and airplanes | summer and
    winter | frogs and toads | lakes and oceans | buying and renting a home | running and walking | emails and
    letters | planets and stars | fiction and history | butter and olive oil | teams and individuals | weather and
    climate | hawks and owls | painting and photography | gold and silver | laptops and tablets | democracy and
    monarchy | rice and pasta | violins and guitars | crocodiles and alligators | facts and opinions | viruses and
    bacteria | speed and acceleration | cotton and wool | mass and weight | comets and asteroids | salt and sugar |
    questions and answers | morning and evening | savings and investments | moths and butterflies
    """
)


COMPARE = (
    "Compare {}. Name two similarities and two differences.",
    "What is the main difference between {}?",
    "Write a short table in words that compares {} on three points.",
    "Two friends argue about {}. Write what each of them says.",
    "Somebody has to choose between {}. What should they think about?",
)


SENTENCES = _entries(
    """
    The meeting was moved to Friday because the room was not free. | Our bus came late, so we walked home in the
    rain. | The museum opens at nine and closes at five every day except Monday. | She finished the report before
    anyone asked for it. | The old bridge was closed after engineers found cracks in it. | I cannot come to the
    party because I have to work. | The soup was too salty, but the bread was fresh and warm. | They planted forty
    trees along the road last spring. | The printer does not work unless you restart it twice. | He forgot his keys
    at the office and had to go back. | The children built a tower of blocks that was taller than their teacher. |
    We need more chairs, because more guests are coming. | The shop gives a discount to students who show a card. |
    A storm cut the power in the village for three hours. | My phone is slow since I installed the last update. |
    The team lost the match although it played well. | Please send me the file before noon, or we will miss the
    deadline. | The river rose quickly and flooded the lower fields. | The library will be closed for repairs until
    the end of the month. | The new recipe takes twenty minutes and needs no oven. | Nobody told the visitors that
    the lift was out of order. | The price of apples went up by a tenth this year. | The dog barked all night, so
    the neighbours complained. | Our flight leaves early, and we still have to pack. | The doctor asked him to rest
    for a week and to drink plenty of water.
    """
)


REWRITE = (
    'Rewrite this sentence in a formal tone: "{}"',
    'Rewrite this sentence for a young child: "{}"',
    'Make this sentence as short as you can without losing its meaning: "{}"',
    'Turn this sentence into a question: "{}"',
    'Continue this sentence with two more that fit: "{}"',
    'Which words in this sentence are verbs? "{}"',
    'Rewrite this sentence as if it were happening tomorrow: "{}"',
    'What might have happened just before this? "{}"',
)


HEROES = _entries(
    """
    a shy baker | a retired sailor | a curious robot | two rival gardeners | a night watchman | a lost kitten | a
    young inventor | a tired teacher | a clumsy wizard | a bus driver | a lonely giant | a clever fox | a forgetful
    king | a brave snail | an honest thief | a violin maker | three old friends | a talking tree | a weather
    forecaster | a shepherd
    """
)


EVENTS = _entries(
    """
    finds an unsigned letter | misses the last train | learns to keep a secret | has to cross a frozen lake | wins a
    prize by mistake | hears music from an empty house | must return a borrowed book | plants a strange seed | gets
    lost in the fog | meets a stranger who knows their name | repairs an old clock | has one day to say goodbye |
    discovers a map in a teapot | is afraid of the dark | makes an unlikely friend
    """
)


STORY = (
    "Write a very short story in which {hero} {event}.",
    "Write the first paragraph of a story in which {hero} {event}.",
    "Write a story of five sentences in which {hero} {event}. End with a surprise.",
)


PEOPLE = _entries("Ana|Ben|Chidi|Dana|Emre|Fatima|George|Hana|Ivan|Julia|Kofi|Lena|Mei|Noor|Omar")


GOODS = _entries("apples|pencils|stickers|books|eggs|marbles|tickets|cookies|shells|cards|lemons|coins")


SUMS: tuple[tuple[str, Callable[[int, int, int], bool]], ...] = (
    ("{who} has {a} {what}, buys {b} more and gives {c} away. How many are left?", lambda a, b, c: a + b >= c),
    ("{who} fills {c} boxes with {b} {what} each. How many {what} is that in all?", lambda a, b, c: True),
    ("One box holds {b} {what}. How many full boxes can {who} make from {a} {what}?", lambda a, b, c: a > b),
    ("{who} had {a} {what} and now has {b}. How many did {who} lose?", lambda a, b, c: a > b),
    ("{c} friends share {a} {what} equally. How many does each get, and how many remain?", lambda a, b, c: a > c),
    ("{who} sells {a} {what} at {c} dollars each and spends {b} dollars. How much is left?", lambda a, b, c: a * c > b),
)


SUM_ENDINGS = ("", " Show your steps.", " Think step by step and give the answer at the end.")


def make_prompts(count: int, seed: int = 0, *, held_out: bool = False) -> list[tuple[dict[str, str], ...]]:
    """Distinct instructions, each a conversation of one user message, in an order that the seed decides.

    The kinds (subjects, how-to, comparisons, rewriting, stories, sums) are mixed in proportions that do not depend on
    ``count``. Equal arguments give equal prompts. There are more than 5,000 training prompts.

    Args:
        count: how many.
        seed: decides which, and their order.
        held_out: take the held-out topics, disjoint from those of the training prompts.

    Raises:
        UserError: ``count`` is below 1 or above what there is.
    """
    texts = list(_texts(held_out))
    if not 1 <= count <= len(texts):
        raise UserError(f"{count} prompts asked for; there are {len(texts)} distinct ones: ask for 1 to {len(texts)}.")
    Random(seed).shuffle(texts)
    return [({"role": "user", "content": text},) for text in texts[:count]]


def _texts(held_out: bool) -> Iterator[str]:
    def part(entries: tuple[str, ...]) -> list[str]:
        return [entry for index, entry in enumerate(entries) if (index % 5 == 4) == held_out]

    for templates, topics in ((ABOUT, SUBJECTS), (HOW_TO, SKILLS), (COMPARE, PAIRS), (REWRITE, SENTENCES)):
        for topic, template in product(part(topics), templates):
            yield template.format(topic)
    for hero, event, template in product(part(HEROES), part(EVENTS), STORY):
        yield template.format(hero=hero, event=event)
    yield from islice(_sums(part(PEOPLE), part(GOODS)), 150 if held_out else 900)


def _sums(people: list[str], goods: list[str]) -> Iterator[str]:
    """Word problems with numbers from a fixed generator: the set of prompts does not depend on the caller's seed."""
    random = Random(" ".join(people))
    seen: set[str] = set()
    while True:
        a, b, c = random.randint(6, 96), random.randint(3, 40), random.randint(2, 9)
        template, fits = random.choice(SUMS)
        text = template.format(who=random.choice(people), what=random.choice(goods), a=a, b=b, c=c)
        if fits(a, b, c) and text not in seen:
            seen.add(text)
            yield text + random.choice(SUM_ENDINGS)
