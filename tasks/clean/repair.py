"""Unicode repair (recipe section 1), by ftfy: text decoded with the wrong encoding, control characters, line ends."""

from __future__ import annotations

import re
import unicodedata

# All invisible characters except the tab, the line end, and the joiners that some scripts need.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u2060\ufeff\ufffe\uffff]")
_LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")


def repair(text: str, unescape_html: bool) -> tuple[str, bool]:
    """Return the text in Unicode's form NFC, and whether something in it was broken.

    These count as broken: text decoded with the wrong encoding (mojibake), terminal escapes, control characters and, if
    `unescape_html`, HTML escapes in text without tags. Other line ends also become a line feed, but are not broken.
    """
    import ftfy
    from ftfy.fixes import remove_terminal_escapes
    from ftfy.fixes import unescape_html as unescape

    fixed = text
    if not text.isascii():  # line by line as ftfy does, but only the lines that can be mojibake
        fixed = "\n".join(line if line.isascii() else ftfy.fix_encoding(line) for line in text.split("\n"))
    if "\x1b" in fixed:
        fixed = remove_terminal_escapes(fixed)
    fixed = _INVISIBLE.sub("", _LINE_END.sub("\n", fixed))
    if unescape_html and "&" in fixed and "<" not in fixed:
        fixed = unescape(fixed)
    return unicodedata.normalize("NFC", fixed).strip("\n"), fixed != _LINE_END.sub("\n", text)
