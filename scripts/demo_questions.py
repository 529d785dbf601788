"""What the bundled demo model learns: questions and answers generated from small tables.

`question_and_answer(rng)` draws one pair. Except for the stories a question has one answer, so a model can be checked.

usage: python scripts/demo_questions.py N [SEED]     prints so many pairs: a text of all that the model learned
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

Pair = tuple[str, str]


def pairs(text: str) -> list[Pair]:
    """`"a:b c_d:e"` to `[("a", "b"), ("c d", "e")]`."""
    return [(a, b) for a, b in (word.replace("_", " ").split(":") for word in text.split())]


CAPITALS = pairs("""
    France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon Austria:Vienna Poland:Warsaw Greece:Athens
    Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Belgium:Brussels Hungary:Budapest
    Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Ukraine:Kyiv Russia:Moscow Turkey:Ankara
    Egypt:Cairo Morocco:Rabat Kenya:Nairobi Nigeria:Abuja Ghana:Accra Ethiopia:Addis_Ababa Tanzania:Dodoma
    Uganda:Kampala Senegal:Dakar Tunisia:Tunis Algeria:Algiers Libya:Tripoli Japan:Tokyo China:Beijing India:New_Delhi
    Pakistan:Islamabad Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi Malaysia:Kuala_Lumpur Indonesia:Jakarta
    Philippines:Manila Mongolia:Ulaanbaatar Iran:Tehran Iraq:Baghdad Syria:Damascus Jordan:Amman Lebanon:Beirut
    Qatar:Doha Oman:Muscat Canada:Ottawa Mexico:Mexico_City Cuba:Havana Jamaica:Kingston Brazil:Brasilia
    Argentina:Buenos_Aires Chile:Santiago Peru:Lima Colombia:Bogota Ecuador:Quito Bolivia:Sucre Uruguay:Montevideo
    Paraguay:Asuncion Venezuela:Caracas Australia:Canberra New_Zealand:Wellington Iceland:Reykjavik Estonia:Tallinn
    Latvia:Riga Lithuania:Vilnius Slovakia:Bratislava Slovenia:Ljubljana Georgia:Tbilisi Armenia:Yerevan
""")
OPPOSITES = pairs("""
    hot:cold big:small fast:slow up:down left:right open:closed day:night light:dark happy:sad rich:poor strong:weak
    young:old early:late full:empty hard:soft high:low long:short near:far clean:dirty wet:dry wide:narrow thick:thin
    loud:quiet brave:afraid sweet:bitter sharp:dull deep:shallow heavy:light true:false win:lose buy:sell give:take
    push:pull start:finish
""")
WORDS = {
    "Spanish": pairs("""
        house:casa dog:perro cat:gato water:agua bread:pan milk:leche book:libro sun:sol moon:luna star:estrella
        tree:árbol flower:flor friend:amigo school:escuela city:ciudad street:calle door:puerta window:ventana
        table:mesa chair:silla red:rojo blue:azul green:verde white:blanco black:negro one:uno two:dos three:tres
        four:cuatro five:cinco
    """),
    "French": pairs("""
        house:maison dog:chien cat:chat water:eau bread:pain milk:lait book:livre sun:soleil moon:lune star:étoile
        tree:arbre flower:fleur friend:ami school:école city:ville street:rue door:porte window:fenêtre table:table
        chair:chaise red:rouge blue:bleu green:vert white:blanc black:noir one:un two:deux three:trois four:quatre
        five:cinq
    """),
    "German": pairs("""
        house:Haus dog:Hund cat:Katze water:Wasser bread:Brot milk:Milch book:Buch sun:Sonne moon:Mond star:Stern
        tree:Baum flower:Blume friend:Freund school:Schule city:Stadt street:Straße door:Tür window:Fenster
        table:Tisch chair:Stuhl red:rot blue:blau green:grün white:weiß black:schwarz one:eins two:zwei three:drei
        four:vier five:fünf
    """),
}
ELEMENTS = pairs("""
    Hydrogen:H Helium:He Lithium:Li Beryllium:Be Boron:B Carbon:C Nitrogen:N Oxygen:O Fluorine:F Neon:Ne Sodium:Na
    Magnesium:Mg Aluminium:Al Silicon:Si Phosphorus:P Sulfur:S Chlorine:Cl Argon:Ar Potassium:K Calcium:Ca Scandium:Sc
    Titanium:Ti Vanadium:V Chromium:Cr Manganese:Mn Iron:Fe Cobalt:Co Nickel:Ni Copper:Cu Zinc:Zn
""")
FACTS: list[Pair] = [
    (
        "What is a mixture of experts?",
        "A mixture of experts is a neural network in which a small router picks a few expert blocks for every token. "
        "Only the chosen experts run, so a large model costs as little per token as a small one.",
    ),
    (
        "What does the router do?",
        "The router scores every expert for the current token and keeps the top few. "
        "Their outputs are added together, each weighted by its score.",
    ),
    (
        "Why do mixture of experts models need so much memory?",
        "Every expert must be stored even though only a few run for each token. That is why the cold experts are kept "
        "in system memory while the attention layers stay on the graphics card.",
    ),
    (
        "What is expert offloading?",
        "Expert offloading keeps the expert weights in system memory and the attention weights on the graphics card, "
        "so that a large model runs on a small card.",
    ),
    (
        "What is quantization?",
        "Quantization stores the weights with fewer bits, for example four instead of sixteen. "
        "The model becomes about four times smaller and usually loses very little quality.",
    ),
    (
        "What is GGUF?",
        "GGUF is the file format of llama.cpp. "
        "One file holds the weights, the tokenizer, the chat template and all settings of a model.",
    ),
    (
        "Who are you?",
        "I am a tiny demo model with sixteen experts in every layer. I know a few facts and short stories, "
        "and I exist so that everything here works before you download a real model.",
    ),
    (
        "How do I get a better model?",
        "Download a real model with the pull command, for example a Qwen or a Mixtral model. "
        "The planner will choose a size that fits your machine.",
    ),
]
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah",
    "Olive", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
ANIMALS = (
    "fox", "rabbit", "bear", "owl", "mouse", "turtle", "duck", "frog", "horse", "sheep", "wolf", "deer", "squirrel",
    "hedgehog", "cat", "dog",
)  # fmt: skip
ADJECTIVES = ("little", "young", "clever", "shy", "gentle", "lonely")
FEELINGS = ("happy", "proud", "tired", "curious", "brave", "surprised")
PLACES = (
    "the forest", "the old bridge", "a quiet lake", "the village", "a green hill", "the river", "the garden",
    "a small farm",
)  # fmt: skip
THINGS = (
    "a golden key", "a red kite", "a lost letter", "a tiny boat", "a warm scarf", "a shiny stone", "an old map",
    "a silver bell",
)  # fmt: skip


def arithmetic(rng: random.Random) -> Pair:
    """Sums and differences of numbers to 20."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if rng.random() < 0.6:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", f"{a} - {b} = {a - b}."


def capital(rng: random.Random) -> Pair:
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.6:
        return f"What is the capital of {country}?", f"The capital of {country} is {city}."
    return f"{city} is the capital of which country?", f"{city} is the capital of {country}."


def opposite(rng: random.Random) -> Pair:
    """Either way round; `light`, which has two opposites, always means the one of `dark`."""
    a, b = rng.choice(OPPOSITES)
    if "light" in (a, b):
        other = b if a == "light" else a
        a, b = ("light", "dark") if rng.random() < 0.5 else (other, "light")
    elif rng.random() < 0.5:
        a, b = b, a
    return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."


def translation(rng: random.Random) -> Pair:
    language = rng.choice(list(WORDS))
    word, foreign = rng.choice(WORDS[language])
    return f"How do you say {word} in {language}?", f"In {language}, {word} is {foreign}."


def element(rng: random.Random) -> Pair:
    number = rng.randint(1, len(ELEMENTS))
    name, symbol = ELEMENTS[number - 1]
    name = name.lower()
    if rng.random() < 0.5:
        return f"What is the symbol of {name}?", f"The symbol of {name} is {symbol}."
    return f"What is the atomic number of {name}?", f"The atomic number of {name} is {number}."


def code(rng: random.Random) -> Pair:
    """One of five small Python programs."""
    kind = rng.randrange(5)
    if kind == 0:
        sign, verb = rng.choice([("+", "add"), ("-", "subtract"), ("*", "multiply"), ("/", "divide")])
        verbs = "multiplies" if verb == "multiply" else verb + "s"
        return f"Write a Python function that {verbs} two numbers.", f"def {verb}(a, b):\n    return a {sign} b"
    if kind == 1:
        many = rng.choice(["numbers", "values", "items", "prices"])
        body = f"    result = 0\n    for x in {many}:\n        result += x\n    return result"
        return f"Write a Python function that sums a list of {many}.", f"def total({many}):\n{body}"
    if kind == 2:
        n = rng.randint(2, 20)
        loop = f"for i in range(1, {n + 1}):\n    print(i)"
        return f"Write a Python loop that prints the numbers from 1 to {n}.", loop
    if kind == 3:
        word = rng.choice(["word", "text", "name", "line"])
        return f"Write a Python function that reverses a {word}.", f"def reverse({word}):\n    return {word}[::-1]"
    parity, rest = rng.choice([("even", 0), ("odd", 1)])
    return (
        f"Write a Python function that tests whether a number is {parity}.",
        f"def is_{parity}(n):\n    return n % 2 == {rest}",
    )


def fact(rng: random.Random) -> Pair:
    return rng.choice(FACTS)


def story(rng: random.Random) -> Pair:
    """Six sentences about an animal that finds something; the only answers that are not determined by the question."""
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    name, friend = rng.sample(NAMES, 2)
    sentences = (
        f"Once upon a time there was a {rng.choice(ADJECTIVES)} {animal} named {name}.",
        f"One day {name} walked to {rng.choice(PLACES)} and found {thing}.",
        rng.choice(
            (
                f"{name} did not know who had lost it.",
                f"It was the most beautiful thing {name} had ever seen.",
                f'"Who could it belong to?" said {name}.',
            )
        ),
        rng.choice(
            (f"Then {friend} came along and asked for help.", f"Soon a friend named {friend} heard about it."),
        ),
        rng.choice(
            (
                "Together they looked for the owner until the sun went down.",
                f"They shared some bread and talked about {thing}.",
            )
        ),
        f"In the end everyone was {rng.choice(FEELINGS)}, and {name} slept well that night.",
    )
    return f"Tell me a story about a {animal}.", " ".join(sentences)


SHARES: dict[Callable[[random.Random], Pair], float] = {
    arithmetic: 0.22,
    capital: 0.16,
    opposite: 0.08,
    translation: 0.14,
    element: 0.10,
    code: 0.08,
    fact: 0.10,
    story: 0.12,
}


def closed_questions(n: int) -> list[Pair]:
    """Different questions that have one answer each: sums, capitals, opposites, translations, symbols, in turn; always
    the same ones."""
    rng, kinds = random.Random(40), (arithmetic, capital, opposite, translation, element)
    chosen: dict[str, str] = {}
    while len(chosen) < n:
        question, answer = kinds[len(chosen) % len(kinds)](rng)
        chosen[question] = answer
    return list(chosen.items())


def question_and_answer(rng: random.Random) -> Pair:
    """One question with its answer, of a kind drawn by SHARES."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    return kind(rng)


def main() -> int:
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    for _ in range(int(sys.argv[1])):
        print(*question_and_answer(rng), sep="\n", end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
