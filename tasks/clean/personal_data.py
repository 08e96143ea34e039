"""Personal data: documents rich in it are rejected, single finds are masked (recipe section 1; Llama 2, section 2.1).

A find is checked, not only matched: phone numbers by phonenumbers (Google's libphonenumber), cards by Luhn's check
digit, IP addresses by the standard library.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence

from pydantic import Field

from tasks.running.params import Section

TYPES = ("email", "ip", "card", "phone")  # in search order: a card's digits are not a phone number

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\d)")
_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?!\w|[.,-]\d)")
_PHONE = re.compile(r"(?<![\w.,/])(?<!\d:)(?:\+|\(\+?)?\d[\d ().\-–/]{5,60}\d(?!\w|[.,/:]\d)")
_NO_PHONE = re.compile(r"[-(]*\d*\.\d+|.*\d{4}-\d\d-\d\d.*")  # a decimal number; a date
_PHONE_CUE = re.compile(r"(?:call|dial|fax|mobile|phone|tel|telephone|whatsapp)\W{1,4}$", re.IGNORECASE)
_CARD_ISSUERS = re.compile(  # by first digits and length: Visa, Mastercard, American Express, Discover, JCB, Diners
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"
)


class PersonalData(Section):
    """What counts as personal data, and how much of it a document may hold."""

    phone_regions: list[str] = Field(description="ISO 3166 regions whose national numbers are recognised without +")
    local_addresses: bool = Field(description="mask loopback, private and documentation IP addresses too")
    rich_min_finds: int = Field(gt=0, description="a document with this many finds or more is rejected ...")
    rich_share: float = Field(ge=0, description="... if they exceed this many per word")


Find = tuple[int, int, str]  # start, end, type


def find_personal_data(text: str, params: PersonalData) -> list[Find]:
    """Return e-mail and IP addresses, card and phone numbers in the text, by position and without overlap."""
    has_digits = re.search(r"\d", text) is not None
    taken: list[Find] = []
    for kind in TYPES:
        if not (has_digits or kind == "email"):
            continue
        for start, end in _FINDERS[kind](text, params):
            place = bisect(taken, (start, end, kind))
            after_others = place == 0 or taken[place - 1][1] <= start
            if after_others and (place == len(taken) or end <= taken[place][0]):
                taken.insert(place, (start, end, kind))
    return taken


def mask(text: str, finds: Sequence[Find]) -> str:
    """Return the text with `[EMAIL]`, `[IP]`, `[CARD]`, `[PHONE]` in the finds' places."""
    parts, position = [], 0
    for start, end, kind in finds:
        parts += [text[position:start], f"[{kind.upper()}]"]
        position = end
    return "".join([*parts, text[position:]])


def is_rich(num_finds: int, num_words: int, params: PersonalData) -> bool:
    """Tell whether a document holds so much personal data that masking would leave little."""
    return num_finds >= params.rich_min_finds and num_finds > params.rich_share * num_words


def _emails(text: str, params: PersonalData) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text) if "@" in text else ():
        yield match.span()


def _addresses(text: str, params: PersonalData) -> Iterator[tuple[int, int]]:
    """Yield IP addresses; four small numbers are a version (1.8.9.1), few groups a time or code (be::)."""
    for pattern, separator, enough in ((_IPV4, ".", 3), (_IPV6, ":", 3)):
        for match in pattern.finditer(text) if separator in text else ():
            groups = [group for group in match.group().split(separator) if group]
            if (max(map(len, groups)) if separator == "." else len(groups)) < enough:
                continue
            try:
                address = ipaddress.ip_address(match.group())
            except ValueError:
                continue
            if params.local_addresses or address.is_global:
                yield match.span()


def _cards(text: str, params: PersonalData) -> Iterator[tuple[int, int]]:
    """Yield numbers that an issuer may have given out, with a correct check digit."""
    for match in _CARD.finditer(text):
        digits = match.group().replace(" ", "").replace("-", "")
        if _CARD_ISSUERS.fullmatch(digits) and luhn([int(digit) for digit in digits]):
            yield match.span()


def luhn(digits: Sequence[int]) -> bool:
    """Check a card number's last digit (ISO/IEC 7812-1, annex B)."""
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _phones(text: str, params: PersonalData) -> Iterator[tuple[int, int]]:
    """Yield numbers that libphonenumber accepts; it only checks what looks like one.

    After a word such as `call`, or with a country code, the right length is enough. Unbroken digits without either are
    skipped: they may count anything.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    for candidate in _PHONE.finditer(text):
        written = candidate.group()
        if sum(map(str.isdigit, written)) < 7 or _NO_PHONE.fullmatch(written):
            continue
        announced = _PHONE_CUE.search(text[max(0, candidate.start() - 20) : candidate.start()]) is not None
        if written.isdigit() and not announced:
            continue
        leniency = Leniency.POSSIBLE if announced or "+" in written else Leniency.VALID
        for region in [None] if "+" in written else params.phone_regions:
            matches = list(PhoneNumberMatcher(written, region, leniency))
            for match in matches:
                opened = match.raw_string.startswith("(") and match.raw_string.count("(") > match.raw_string.count(")")
                yield candidate.start() + match.start + opened, candidate.start() + match.end
            if matches:
                break


_FINDERS: dict[str, Callable[[str, PersonalData], Iterator[tuple[int, int]]]] = {
    "email": _emails,
    "ip": _addresses,
    "card": _cards,
    "phone": _phones,
}
