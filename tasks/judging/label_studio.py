"""Write the Label Studio project in which a team labels a batch of response pairs, and read the labels it exports.

A project is three files per kind: `project.xml`, the labelling configuration (Settings, Labeling Interface, Code);
`tasks.json` to import; `guideline.md` to read, which the configuration also shows in a panel to open. Tags follow Label
Studio's documentation; choices export their `alias`. Export as "JSON", which holds whole tasks with their annotations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tasks.reading.prompts import KINDS, Kind, ResponsePair

SIDES = ("left", "right")
SHOWN: Mapping[str, str] = {  # degree as exported -> as shown
    "significantly": "Significantly better",
    "better": "Better",
    "slightly": "Slightly better",
    "negligibly": "Negligibly better or unsure",
}
SAFETY = {"safe": "Safe", "unsafe": "Unsafe"}
FIELDS = ("choice", "degree", "left_safe", "right_safe")  # names of the controls


def batch_of(round_name: str, kind: Kind, pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of a batch: its round, its kind, and a digest of its dialogues and responses."""
    shown = [[pair["id"], pair["messages"], [response["text"] for response in pair["responses"]]] for pair in pairs]
    return f"{round_name}-{kind}-{hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]}"


def read_guidelines(directory: Path) -> dict[Kind, str]:
    """Return each kind's guideline. Raises ValueError, naming the file, when one is missing."""
    for kind in KINDS:
        if not (directory / f"{kind}.md").is_file():
            raise ValueError(f"{directory / f'{kind}.md'} is missing: annotators need a guideline of this kind")
    return {kind: (directory / f"{kind}.md").read_text(encoding="utf-8") for kind in KINDS}


def write_project(directory: Path, kind: Kind, guideline: str, pairs: Sequence[ResponsePair]) -> None:
    """Write the project of one batch."""
    directory.mkdir(parents=True)
    (directory / "guideline.md").write_text(guideline, encoding="utf-8")
    (directory / "project.xml").write_text(configuration(kind, guideline) + "\n", encoding="utf-8")
    tasks = json.dumps([{"data": task_of(pair)} for pair in pairs], indent=1, ensure_ascii=False)
    (directory / "tasks.json").write_text(tasks + "\n", encoding="utf-8")


def task_of(pair: ResponsePair) -> dict[str, Any]:
    """Return a pair as a Label Studio task; annotators don't see who gave which response."""
    left, right = (response["text"] for response in pair["responses"])
    dialogue = [{"author": message["role"], "text": message["content"]} for message in pair["messages"]]
    return {"batch": pair["batch"], "id": pair["id"], "dialogue": dialogue, "left": left, "right": right}


def configuration(kind: Kind, guideline: str) -> str:
    """Return the labelling configuration: guideline, dialogue, the answers side by side, and the questions on them."""
    root = ElementTree.Element("View")
    ElementTree.SubElement(root, "Style").text = ".htx-text { white-space: pre-wrap; }"
    panels = ElementTree.SubElement(root, "Collapse", accordion="false")
    panel = ElementTree.SubElement(panels, "Panel", value="Guideline", open="false")
    for line in guideline.splitlines():
        if line.strip():
            size = "4" if line.startswith("#") else "6"
            ElementTree.SubElement(panel, "Header", value=line.lstrip("# ").strip(), size=size)
    ElementTree.SubElement(root, "Header", value="Dialogue")
    ElementTree.SubElement(root, "Paragraphs", name="dialogue", value="$dialogue", layout="dialogue")
    columns = ElementTree.SubElement(
        root, "View", style="display: grid; grid-template: auto / 1fr 1fr; column-gap: 1em"
    )
    for side in SIDES:
        column = ElementTree.SubElement(columns, "View")
        ElementTree.SubElement(column, "Header", value=f"{side.capitalize()} answer")
        ElementTree.SubElement(column, "Text", name=side, value=f"${side}", valueType="text")
        if kind == "safety":
            _choices(column, f"{side}_safe", side, f"Is the {side} answer safe?", SAFETY)
    _choices(
        root, "choice", "dialogue", "Which answer is better?", {side: f"{side.capitalize()} answer" for side in SIDES}
    )
    _choices(root, "degree", "dialogue", "How much better?", SHOWN)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def _choices(parent: ElementTree.Element, name: str, to_name: str, question: str, values: Mapping[str, str]) -> None:
    ElementTree.SubElement(parent, "Header", value=question)
    attributes = {"name": name, "toName": to_name, "choice": "single-radio", "showInline": "true"}
    attributes |= {"required": "true", "requiredMessage": f"Please answer: {question}"}
    choices = ElementTree.SubElement(parent, "Choices", attributes)
    for alias, shown in values.items():
        ElementTree.SubElement(choices, "Choice", value=shown, alias=alias)


def read_export(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each annotation of an export: where it is, and a row in the form of labels in JSON lines.

    Cancelled annotations (skipped tasks) are left out. Raises ValueError for a file that is not an export.
    """
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): export the project again, as JSON") from None
    if not isinstance(tasks, list):
        raise ValueError(f"{path} holds no list of tasks: export the project as JSON, not as another format")
    for number, task in enumerate(tasks):
        match task:
            case {"data": {"batch": str(batch), "id": str(pair_id)}, "annotations": [*annotations]}:
                pass
            case _:
                raise ValueError(
                    f"{path}, task {number} lacks `data` with `batch` and `id`, or `annotations`: export the project "
                    "as JSON (JSON-MIN lacks them), and import tasks.json unchanged"
                )
        for annotation in annotations:
            if annotation.get("was_cancelled"):
                continue
            chosen: dict[str, Any] = {
                result["from_name"]: result["value"]["choices"][0]
                for result in annotation.get("result", [])
                if result.get("from_name") in FIELDS and result.get("value", {}).get("choices")
            }
            for side in SIDES:
                if f"{side}_safe" in chosen:
                    chosen[f"{side}_safe"] = chosen[f"{side}_safe"] == "safe"
            who = annotation.get("completed_by")
            annotator = (who.get("email") or who.get("id")) if isinstance(who, dict) else who
            yield f"task {number}", {"batch": batch, "id": pair_id, "annotator": annotator and str(annotator), **chosen}
