"""Write a profile's values and the user's own into params.yaml, the only place where values live.

A profile is a file of overrides: dotted names of params.yaml and their values, nothing else. `--set` on the command
line and a deployment's `overrides` are the same, given by hand. DVC reads only params.yaml, so a later `dvc repro`
does the same as the flow; `git diff params.yaml` shows what was written, `git checkout params.yaml` reverts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from tasks.running.params import PARAMS_FILE, flatten, read_params

PROFILES = Path("profiles")
NULL_TAG = "tag:yaml.org,2002:null"


def read_profile(name: str) -> dict[str, Any]:
    """Return a profile's overrides.

    Raises ValueError when there is no such profile, naming the existing ones, and when it is not a mapping.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise ValueError(f"there is no profile `{name}` ({path}); profiles: {names}")
    return read_params(path)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return `sft.learning_rate=1e-5` as name and value; the value is parsed as YAML.

    Raises ValueError for a text without `=`, and for a value that is not valid YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write it as NAME=VALUE, for instance --set pretrain.learning_rate=1e-3")
    try:
        return name.strip(), YAML(typ="safe").load(value)
    except YAMLError:
        raise ValueError(f"--set {text}: the value is not valid YAML; put text in quotes") from None


def override(params: Any, overrides: Mapping[str, Any], origin: str) -> None:
    """Set values by their dotted names in `params`, which ruamel.yaml's round-trip loader has read.

    A mapping is replaced whole, not merged. A value that a section shares with others (YAML's merge key) becomes a line
    of that section's own. Raises ValueError for a name that params.yaml does not have, naming `origin` and the closest
    match, and for a whole mapping that sections share: their merge keys refer to its lines.
    """
    from ruamel.yaml.comments import CommentedMap

    for name, value in overrides.items():
        *parents, last = name.split(".")
        place = params
        for key in parents:
            place = place.get(key) if isinstance(place, Mapping) else None
        if not isinstance(place, Mapping) or last not in place:
            known = [*flatten(params), *(".".join(name.split(".")[:-1]) for name in flatten(params))]
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{origin}: `{name}` is not a parameter of params.yaml{hint}")
        if isinstance(place[last], CommentedMap) and place[last].anchor.value:
            first = f"{name}.{next(iter(place[last]))}"
            raise ValueError(f"{origin}: `{name}` is shared by several sections: set its values one by one, `{first}`")
        if isinstance(place, CommentedMap) and last not in dict(place.non_merged_items()):
            # right below the merge key: at the section's end it would come after the empty line
            place.insert(place.merge.merge_pos + 1, last, value)
        else:
            place[last] = value  # type: ignore[index]


def parse(text: str) -> dict[str, Any]:
    """Return params.yaml's text as a dictionary."""
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe").load(text))


def compose(profiles: Sequence[str], overrides: Mapping[str, Any]) -> str:
    """Return params.yaml's text with the profiles' values and then the overrides written in, keeping comments.

    If no value changes, the text is returned unchanged. Raises ValueError for a wrong name, and for a params.yaml that
    can't be read.
    """
    read_params()  # for its messages about a file that can't be read

    def change(params: Any) -> None:
        for profile in profiles:
            override(params, read_profile(profile), f"profiles/{profile}.yaml")
        override(params, overrides, "overrides")

    return edit(PARAMS_FILE.read_text(encoding="utf-8"), change)


def edit(text: str, change: Callable[[Any], None]) -> str:
    """Return params.yaml's text after `change` has been made to its values, keeping comments.

    If no value changes, the text is returned unchanged.
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(NULL_TAG, "null"))
    params = yaml.load(text)
    change(params)
    after = StringIO()
    yaml.dump(params, after)
    return text if parse(after.getvalue()) == parse(text) else after.getvalue()


def append(mapping: Any, key: str, value: Any) -> None:
    """Add an entry at the end of a mapping that `edit` has read: before the empty line and comments that follow it.

    A mapping or list becomes one line of its own; so does an empty mapping's first entry.
    """
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    comment = None  # the one that stands last in the mapping: to the end of its line, and all that follows
    if not mapping:
        mapping.fa.set_block_style()
        comment = mapping.ca.comment and mapping.ca.comment[0]
    elif not mapping.fa.flow_style():
        owner, last = mapping, next(reversed(mapping))
        while isinstance(owner[last], CommentedMap) and owner[last] and not owner[last].fa.flow_style():
            owner = owner[last]
            last = next(reversed(owner))
        comment = last in owner.ca.items and owner.ca.items[last][2]
    following = ""
    if comment:
        own, end, following = comment.value.partition("\n")
        comment.value = own + end
    if isinstance(value, dict | list):
        value = (CommentedMap if isinstance(value, dict) else CommentedSeq)(value)
        value.fa.set_flow_style()
    mapping[key] = value
    if following:
        mapping.ca.items[key] = [None, None, CommentToken(f"\n{following}", CommentMark(0)), None]


def write(text: str) -> bool:
    """Replace params.yaml in one step if it changes; return whether it did."""
    if text == PARAMS_FILE.read_text(encoding="utf-8"):
        return False
    temporary = PARAMS_FILE.with_suffix(".yaml.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PARAMS_FILE)
    return True
