"""The command `export`: a model for others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from capgap.cli.app import Json, Quiet, app, print_json, quieten_transformers


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    shard_size: Annotated[str, typer.Option(help="Bytes of a weight file at most.")] = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; as stored if not given.")
    ] = None,
    record: Annotated[
        list[Path] | None,
        typer.Option(help="A record of another stage, for the model card."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="Also write this file for llama.cpp.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in its card.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write a model for others: sharded weights, tokenizer, model card, GGUF."""
    from rich.console import Console

    from capgap.sizes import parse_bytes
    from capgap.stages.export import ExportRequest, run_export
    from capgap.sweep.progress import make_lines

    quieten_transformers()
    request = ExportRequest(
        model,
        out,
        shard_bytes=parse_bytes(shard_size),
        dtype=dtype,
        records=tuple(record or ()),
        gguf=gguf,
        name=name,
    )
    found = run_export(request, say=make_lines(Console(stderr=True), quiet=quiet))
    if json_:
        print_json(found)
    else:
        _print_export(found)


def _print_export(found: dict[str, Any]) -> None:
    from capgap.sizes import format_bytes, format_count

    weights = sum(file.endswith(".safetensors") for file in found["files"])
    print(
        f"{found['name']}: {format_count(found['parameters'])} parameters in {found['dtype']}, "
        f"{format_bytes(found['bytes'])} with {weights} weight file{'s'[: weights != 1]}, in "
        f"{found['folder']}"
    )
    licence = found["licence"]
    told = f"unknown ({licence['source']}): find it out before you pass the model on"
    if licence["id"] is not None:
        told = f"{licence['id']}, from {licence['source']}"
    print(f"licence: {told}")
    print(f"model card from: {', '.join(found['records']) or 'the weights alone, no record found'}")
    not_compared = found["logits_not_compared"]
    print(
        "logits: those of the model, tried with a few tokens"
        if not_compared is None
        else f"logits: not compared with the model's ({not_compared})"
    )
    print(f"vLLM: {_vllm(found)}")
    if found["gguf"] is not None:
        _print_gguf(found["gguf"])


def _vllm(found: dict[str, Any]) -> str:
    vllm = found["vllm"]
    checks = len(vllm["checked"])
    if not checks:
        return f"what it asks of {found['architecture']} models is not known here"
    told = f"the config fits {vllm['architecture']} ({checks} checks; vLLM itself was not run)"
    return "; ".join(vllm["problems"]) or told


def _print_gguf(found: dict[str, Any]) -> None:
    from capgap.sizes import format_bytes

    print(
        f"{found['file']}: {format_bytes(found['bytes'])}, read back: {found['compared_tensors']} "
        f"tensors and {found['compared_keys']} keys are equal"
    )
    if found["missing_splits"]:
        print(
            f"warning: llama.cpp may cut some words into other tokens, since it knows "
            f"{found['missing_splits']} joins of pieces that this tokenizer does not make"
        )
