"""Arithmetic and lists in words: small sums, differences, comparisons, counting, sorting, days of the week."""

from __future__ import annotations

import random
from collections.abc import Callable

from tasks.world.facts import World
from tasks.world.wording import capitalized, fields, joined

UNITS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905 (shorter to read)
UNITS += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
OPENINGS = [
    "Some exercises for a rainy afternoon.",
    "The teacher wrote these sums on the board.",
    "Counting is easy with a little practice.",
    "A page from the exercise book of a pupil.",
    "Here is a list of small problems, each with its answer.",
    "The clerk of the market checks the numbers twice.",
    "Work through these problems one by one.",
    "Numbers help us every day.",
]
DIGITS = 0.4  # share of problems in digits, the others in words


def in_words(number: int) -> str:
    """Return a number from 0 to 99 in words: 42 -> "forty-two"."""
    if number < len(UNITS):
        return UNITS[number]
    tens, units = divmod(number, 10)
    return TENS[tens] if units == 0 else f"{TENS[tens]}-{UNITS[units]}"


def exercises(world: World, generator: random.Random) -> str:
    """Write a page of small problems with their answers, in digits or in words."""
    kinds = [story_sum, story_difference, bare_sum, comparison, counting, ordering, sharing]
    drawn = [story_sum, *generator.choices(kinds, k=generator.randint(6, 9))]
    sentences = [kind(world, str if generator.random() < DIGITS else in_words, generator) for kind in drawn]
    return " ".join([generator.choice(OPENINGS), *sentences])


def things(world: World, generator: random.Random) -> tuple[str, str, str]:
    """Draw a person, that person's pronoun as a subject, and what the person makes."""
    person = generator.choice([person for person in world.of_kind("person") if person.pronoun != "they"])
    craft = world.entities[world.values["craft"][person.facts["craft"].value]["craft"]]
    return person.name, fields(world, person)["they"], craft.facts["product"].value


def story_sum(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write a sum as a small story."""
    name, they, product = things(world, generator)
    first, second = generator.randint(2, 30), generator.randint(2, 30)
    a, b, c = spell(first), spell(second), spell(first + second)
    return generator.choice([
        f"{name} has {a} {product} and makes {b} more, so now there are {c} {product}.",
        f"On the shelf of {name} stand {a} {product}; {they} adds {b}, which makes {c}.",
        f"If {name} makes {a} {product} in the morning and {b} in the evening, that is {c} {product} in a day.",
        f"{name} sold {a} {product} on one day and {b} on the next, {c} in all.",
    ])  # fmt: skip


def story_difference(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write a difference as a small story."""
    name, they, product = things(world, generator)
    second, left = generator.randint(1, 25), generator.randint(1, 25)
    a, b, c = spell(second + left), spell(second), spell(left)
    return generator.choice([
        f"{name} had {a} {product} and sold {b}, so {c} are left.",
        f"Of the {a} {product} of {name}, {b} were broken, and {they} kept the other {c}.",
        f"From {a} {product} {name} gave away {b}; that leaves {c}.",
        f"{name} wanted to make {a} {product} and has made {b}, so {c} are still missing.",
    ])  # fmt: skip


def bare_sum(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write a sum, a difference or a product without a story."""
    first, second = generator.randint(1, 40), generator.randint(1, 40)
    small, factor = generator.randint(2, 9), generator.randint(2, 9)
    text = generator.choice([
        f"The sum of {spell(first)} and {spell(second)} is {spell(first + second)}.",
        f"{spell(first)} plus {spell(second)} is {spell(first + second)}.",
        f"{spell(first + second)} minus {spell(second)} is {spell(first)}.",
        f"{spell(small)} times {spell(factor)} is {spell(small * factor)}.",
        f"Take {spell(second)} away from {spell(first + second)} and {spell(first)} remain.",
    ])  # fmt: skip
    return capitalized(text)


def comparison(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write which of two numbers is larger."""
    small, large = sorted(generator.sample(range(1, 99), 2))
    a, b = spell(small), spell(large)
    x, y = generator.sample([a, b], 2)
    return generator.choice([
        f"Which is larger, {x} or {y}? The larger number is {b}.",
        f"Which is smaller, {x} or {y}? The smaller number is {a}.",
        capitalized(f"{b} is more than {a}."),
        capitalized(f"{a} is less than {b}."),
        f"Between {x} and {y} the larger one is {b}.",
    ])  # fmt: skip


def counting(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write a run of numbers, or the number before or after another."""
    start = generator.randint(1, 60)
    run = [spell(number) for number in range(start, start + generator.randint(4, 5))]
    return generator.choice([
        f"Counting from {run[0]} to {run[-1]} we say {joined(run)}.",
        f"After {run[0]} comes {run[1]}, and after {run[1]} comes {run[2]}.",
        f"The number before {run[1]} is {run[0]}.",
        f"Counting backwards from {run[-1]} to {run[0]} we say {joined(run[::-1])}.",
    ])  # fmt: skip


def ordering(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write numbers or names in order, or the days of the week."""
    numbers = generator.sample(range(1, 60), 3)
    kind = generator.choice(["person", "place", "animal", "craft"])
    names = [entity.name for entity in generator.sample(world.of_kind(kind), min(4, len(world.of_kind(kind))))]
    mixed, sorted_numbers = joined([spell(n) for n in numbers]), joined([spell(n) for n in sorted(numbers)])
    day = generator.randrange(7)
    return generator.choice([
        f"From small to large, {mixed} become {sorted_numbers}.",
        f"In the order of the alphabet, {joined(names)} become {joined(sorted(names))}.",
        f"Put {joined(names)} in the order of the alphabet, and the first is {min(names)}.",
        f"The day after {DAYS[day]} is {DAYS[(day + 1) % 7]}.",
        f"Two days after {DAYS[day]} it is {DAYS[(day + 2) % 7]}.",
    ])  # fmt: skip


def sharing(world: World, spell: Callable[[int], str], generator: random.Random) -> str:
    """Write a product or a division as a small story."""
    name, _, product = things(world, generator)
    people, each = generator.randint(2, 9), generator.randint(2, 9)
    a, b, c = spell(people), spell(each), spell(people * each)
    return generator.choice([
        f"If {a} friends get {b} {product} each from {name}, that is {c} {product}.",
        f"{name} shares {c} {product} among {a} friends, and each gets {b}.",
        f"In {a} boxes with {b} {product} each {name} has {c} {product}.",
    ])  # fmt: skip


def lists(world: World, generator: random.Random) -> str:
    """Write a page of lists: who or what belongs together, one list per line."""
    lines = [generator.choice(OPENINGS).replace("problems", "lists").replace("sums", "lists")]
    for _ in range(generator.randint(5, 7)):
        kind = generator.choice(["person", "place", "animal", "craft"])
        some = generator.sample(world.of_kind(kind), min(generator.randint(3, 6), len(world.of_kind(kind))))
        names = [entity.name for entity in some]
        plural = {"person": "people", "place": "towns", "animal": "animals", "craft": "crafts"}[kind]
        count = in_words(len(names))
        lines.append(generator.choice([
            f"Here are {count} {plural}: {joined(names)}.",
            f"A list of {plural}: {joined(names)}, {count} in all.",
            f"The {plural} {joined(names)} are sorted like this: {joined(sorted(names))}.",
            f"Of the {plural} {joined(names)}, the first is {names[0]} and the last is {names[-1]}.",
            f"There are {count} {plural} on this list, namely {joined(names)}.",
            f"If you take {names[0]} from the list {joined(names)}, then {joined(names[1:])} are left.",
        ]))  # fmt: skip
    return "\n".join(lines)
