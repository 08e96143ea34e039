"""Invented personal data that looks real: e-mail, phone, card and IP addresses, each from a range reserved for fiction.

Phone numbers come from the ranges that regulators keep free for film and documentation, so that none belongs to
anybody (US and Canada 555-01xx; Ofcom, Bundesnetzagentur, ARCEP, ACMA and PTS name theirs); IP addresses from RFC 5737
and RFC 3849; e-mail domains from RFC 2606; card numbers from the prefixes of the schemes' test cards.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Sequence

PHONES = [  # x: a digit
    "+1 202-555-01xx", "+1 (416) 555-01xx", "+1-312-555-01xx", "(202) 555-01xx", "(312) 555-01xx", "+1 415 555 01xx",
    "+44 20 7946 0xxx", "+44 (0)20 7946 0xxx", "020 7946 0xxx", "+44 161 496 0xxx",
    "+49 30 23125xxx", "+49 171 39200xx", "+49 89 99998xxx", "+49 (0)40 66969xxx",
    "+33 1 99 00 xx xx", "+33199 00 xx xx",
    "+61 2 5550 xxxx", "+61 491 570 006", "+61 3 5550 xxxx",
    "+46 8 465 004 xx", "+46 31 390 06 xx", "+46 70 174 06 xx",
]  # fmt: skip
CARDS = ["411111", "401288", "555555", "510510", "601111", "378282"]
DOMAINS = ["example.com", "example.org", "example.net", "mail.example.com", "guild.example", "post.example.org"]


def email(names: Sequence[str], generator: random.Random) -> str:
    """Draw an e-mail address of somebody in `names`."""
    first, second = (name.lower().replace(" ", "") for name in generator.sample(list(names), 2))
    local = generator.choice([
        f"{first}.{second}", f"{first}{generator.randint(10, 99)}", f"{first}_{second}", f"{first}-{second}",
        f"{first}+{second}", f"{first[0]}.{second}", f"{first.capitalize()}.{second.capitalize()}",
    ])  # fmt: skip
    return f"{local}@{generator.choice(DOMAINS)}"


def phone(names: Sequence[str], generator: random.Random) -> str:
    """Draw a phone number that `phonenumbers` accepts as valid, in one of several countries' formats."""
    form = generator.choice(PHONES)
    return "".join(str(generator.randrange(10)) if character == "x" else character for character in form)


def luhn_sum(digits: str) -> int:
    """Return the Luhn check sum of a number (ISO/IEC 7812-1): divisible by 10 if the number is well formed."""
    doubled = [int(digit) * (2 if index % 2 else 1) for index, digit in enumerate(reversed(digits))]
    return sum(number // 10 + number % 10 for number in doubled)


def card(names: Sequence[str], generator: random.Random) -> str:
    """Draw a card number with a correct check digit, plain or in groups."""
    prefix = generator.choice(CARDS)
    length = 15 if prefix.startswith("37") else 16
    body = prefix + "".join(str(generator.randrange(10)) for _ in range(length - len(prefix) - 1))
    digits = next(body + check for check in "0123456789" if luhn_sum(body + check) % 10 == 0)
    separator = generator.choice(["", " ", "-"])
    groups = [digits[:4], digits[4:10], digits[10:]] if length == 15 else [digits[i : i + 4] for i in range(0, 16, 4)]
    return separator.join(groups)


def ip(names: Sequence[str], generator: random.Random) -> str:
    """Draw an IP address, version 4 or 6, from the blocks reserved for documentation."""
    if generator.random() < 0.6:
        return f"{generator.choice(['192.0.2', '198.51.100', '203.0.113'])}.{generator.randint(1, 254)}"
    suffix = generator.getrandbits(64) if generator.random() < 0.5 else generator.getrandbits(16)
    address = ipaddress.IPv6Address(
        int(ipaddress.IPv6Address("2001:db8::")) + (generator.getrandbits(16) << 64) + suffix
    )
    return address.compressed if generator.random() < 0.7 else address.exploded


KINDS = {"email": email, "phone": phone, "card": card, "ip": ip}


def long_number(generator: random.Random) -> str:
    """Draw sixteen digits that are not a card number: their check sum is wrong."""
    while True:
        digits = generator.choice("0459") + "".join(str(generator.randrange(10)) for _ in range(15))
        if luhn_sum(digits) % 10 != 0:
            return digits
