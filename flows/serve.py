"""Serve a checkpoint as OpenAI's chat completions: `python -m flows.serve [CHECKPOINT] [--port N]`.

CHECKPOINT is a Hugging Face Llama directory, for instance data/sft; by default the champion, as in `make chat`. Only
this machine can reach the server. Where vLLM is installed and there is a GPU, vLLM serves; else the project's own
sampler does, behind FastAPI (flows/completions.py). `transformers serve` would sample with other code than every stage
here does, and reads `</s>` in a message as the end of a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from flows import chat, servers
from flows.completions import Endpoint, application
from flows.recipe import guarded
from tasks.running.params import Machine, Section, parse_section, read_params

HOST = "127.0.0.1"
SECONDS_TO_STOP = 2  # for answers that are being streamed when the server is stopped


class Params(Section):
    """How the server listens; what a request leaves open has the values of section `chat`."""

    port: int = Field(gt=0, lt=65536, description="port on 127.0.0.1")
    max_choices: int = Field(gt=0, description="most answers to one request (its `n`), which are sampled together")


def vllm_command(program: str, directory: Path, port: int, drawing: chat.Params) -> list[str]:
    """Return the command by which vLLM serves a checkpoint with its chat template, as our own server would.

    Its own defaults would take generation_config.json's values, and let every web page ask (its origins are `*`).
    """
    values = {key: getattr(drawing, key) for key in ("temperature", "top_p", "top_k", "max_new_tokens")}
    return [
        program, "serve", str(directory), "--served-model-name", name_of(directory), "--host", HOST,
        "--port", str(port), "--dtype", {"fp32": "float32", "bf16": "bfloat16"}[drawing.precision],
        "--generation-config", "vllm", "--override-generation-config", json.dumps(values),
        "--allowed-origins", "[]",
    ]  # fmt: skip


def name_of(directory: Path) -> str:
    """Return the name by which clients ask for a checkpoint's model: that of its folder."""
    return directory.absolute().name


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Serve OpenAI's chat completions.")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a directory; default: the champion")
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1; default: serve.port of params.yaml")
    asked = parser.parse_args(arguments)
    return guarded(lambda: _serve(asked.checkpoint, asked.port))


def _serve(checkpoint: str | None, port: int | None) -> int:
    values = read_params()
    drawing, machine = parse_section(chat.Params, values, "chat"), parse_section(Machine, values, "machine")
    given = {**values.get("serve", {}), **({} if port is None else {"port": port})}
    params = parse_section(Params, {"serve": given}, "serve")
    directory, why = chat.choose(checkpoint)
    if not servers.port_is_free(params.port):
        raise ValueError(f"port {params.port} of {HOST} is busy: stop what listens there, or choose another by --port")
    import torch

    reason = f", {why}" if why else ""
    address = f"{name_of(directory)} ({directory}{reason}) at http://{HOST}:{params.port}/v1; Ctrl-C stops it"
    program = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program and torch.cuda.is_available():
        chat.show(f"vLLM serves {address}.\n")
        os.execv(program, vllm_command(program, directory, params.port, drawing))  # noqa: S606 - no shell
    import uvicorn

    opened = chat.open_chat(directory, drawing, machine.threads, seed=0)
    endpoint = Endpoint(name_of(directory), opened.model, opened.tokenizer, drawing, params.max_choices)
    chat.show(f"Serving {address}.\n")
    config = uvicorn.Config(
        application(endpoint), host=HOST, port=params.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=SECONDS_TO_STOP, lifespan="on",
    )  # fmt: skip
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        uvicorn.Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
