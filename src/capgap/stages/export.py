"""The stage `export`: a model as others load it, with a card that says where it comes from."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from capgap.artifact import read_json
from capgap.section import Section
from capgap.sizes import format_bytes, format_count, parse_bytes
from capgap.stage import ARGUMENT, HOW, SEVERAL, FieldError, Mark, Say, Stage

if TYPE_CHECKING:
    from capgap.export.folder import Source
    from capgap.export.lineage import Lineage

ExportDtype = Annotated[
    Literal["stored", "fp32", "bf16", "fp16"], "What the weights are written in:"
]


class ExportSection(Section):
    """The folder to hand on."""

    gguf: Annotated[bool, "Also write a GGUF file, for llama.cpp."] = False
    dtype: ExportDtype = "stored"


class Export(Stage):
    """Write a model for others: sharded weights, tokenizer, model card, GGUF."""

    continues: ClassVar[bool] = False
    saves_when_asked: ClassVar[bool] = False

    model: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    out: Annotated[Path, HOW, "Folder to write; it must not exist."]
    shard_size: Annotated[
        str, "Bytes of a weight file at most, such as 500MB; so much is held in memory."
    ] = "5GB"
    dtype: ExportDtype = "stored"
    record: Annotated[
        tuple[Path, ...],
        SEVERAL,
        "A record for the model card, beside those that lie beside and above MODEL.",
    ] = ()
    gguf: Annotated[Path | None, "Also write this file for llama.cpp."] = None
    name: Annotated[str | None, "The model's name in its card; if none, its folder's."] = None
    push: Annotated[str | None, HOW, "Then upload it to the Hub as OWNER/NAME, private."] = None
    public: Annotated[bool, HOW, "What is uploaded may be seen by all."] = False
    dry_run: Annotated[bool, HOW, "Tell what would be uploaded, and upload nothing."] = False

    @model_validator(mode="after")
    def _of_a_push(self) -> Self:
        if self.push is None and (self.public or self.dry_run):
            raise ValueError("public and dry_run are of use with push alone")
        return self

    def run(self, *, say: Say = lambda text: None, **_: Any) -> dict[str, Any]:
        """Writes a Hugging Face folder, and the GGUF file; returns what `--json` prints.

        Tensors are read, checked and written one file at a time; then logits are compared, for
        which the whole model is read where memory suffices. UserError for the user's mistakes, NaN
        among the weights too; nothing is written then.
        """
        from capgap.corpus.tokenizer import num_words
        from capgap.export.folder import DTYPES, open_source, write_folder
        from capgap.export.gguf_file import check_gguf
        from capgap.export.lineage import find_lineage
        from capgap.export.push import check_push, push
        from capgap.models.stored import written_beside
        from capgap.stages.inputs import check_words

        for field, path in (("out", self.out), ("gguf", self.gguf)):
            if path is not None and path.exists():
                raise FieldError(field, f"{path} exists: choose another, or delete it")
        if self.gguf is not None and self.out.resolve() in self.gguf.resolve().parents:
            raise FieldError("gguf", f"{self.gguf} lies within {self.out}: put it beside")
        if self.push is not None:
            check_push(self.push, upload=not self.dry_run)
        shard_bytes = parse_bytes(self.shard_size)
        source = open_source(self.model, DTYPES[self.dtype])
        check_words(self.model, source.config, num_words(source.tokenizer))
        if self.gguf is not None:
            check_gguf(source.config, source.tokenizer)
        lineage = find_lineage(source.folder, self.record)
        with ExitStack() as undo:
            if self.gguf is not None:
                undo.callback(self.gguf.unlink, missing_ok=True)
            with written_beside(self.out) as folder:
                write_folder(source, folder, shard_bytes=shard_bytes, say=say)
                found = self._finish(source, lineage, folder)
            undo.pop_all()
        if self.push is not None:
            files = [self.out] if self.gguf is None else [self.out, self.gguf]
            how = {"public": self.public, "upload": not self.dry_run}
            found["push"] = push(self.push, files, found["licence"]["id"], **how, say=say)
        return found

    def told(self, found: dict[str, Any]) -> str:
        weights = sum(file.endswith(".safetensors") for file in found["files"])
        licence, vllm, gguf = found["licence"], found["vllm"], found["gguf"]
        terms = f"{licence['id']}, from {licence['source']}"
        if licence["id"] is None:
            terms = f"unknown ({licence['source']}): find it out before you pass the model on"
        records = ", ".join(found["records"]) or "the weights alone, no record found"
        logits = "those of the model, tried with a few tokens"
        if found["logits_not_compared"] is not None:
            logits = f"not compared with the model's ({found['logits_not_compared']})"
        checks = f"{len(vllm['checked'])} checks; vLLM itself was not run"
        fits = f"the config fits {vllm['architecture']} ({checks})"
        if not vllm["checked"]:
            fits = f"what it asks of {found['architecture']} models is not known here"
        lines = [
            f"{found['name']}: {format_count(found['parameters'])} parameters in {found['dtype']}, "
            f"{format_bytes(found['bytes'])} with {weights} weight file{'s'[: weights != 1]}, in "
            f"{found['folder']}",
            f"licence: {terms}",
            f"model card from: {records}",
            f"logits: {logits}",
            f"vLLM: {'; '.join(vllm['problems']) or fits}",
        ]
        if gguf is not None:
            lines.append(
                f"{gguf['file']}: {format_bytes(gguf['bytes'])}, read back: "
                f"{gguf['compared_tensors']} tensors and {gguf['compared_keys']} keys are equal"
            )
        if gguf is not None and gguf["missing_splits"]:
            lines.append(
                f"warning: llama.cpp may cut some words into other tokens, since it knows "
                f"{gguf['missing_splits']} joins of pieces that this tokenizer does not make"
            )
        if found["push"] is not None:
            verb = "uploaded" if found["push"]["uploaded"] else "not uploaded"
            lines.append(f"{verb}: {found['push']['url'] or found['push']['name']}")
        return "\n".join(lines)

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        return ("chat" if found["chat_template"] else "sample", self.out)

    @property
    def writes(self) -> tuple[Path, ...]:
        return (self.out,) if self.gguf is None else (self.out, self.gguf)

    def _finish(self, source: "Source", lineage: "Lineage", folder: Path) -> dict[str, Any]:
        """Licence, card and GGUF file beside the weights, and what `run` returns."""
        from capgap.export.card import CARD, card_text
        from capgap.export.facts import model_card
        from capgap.export.folder import check_logits, check_vllm, copy_licence
        from capgap.export.gguf_file import write_gguf

        card = model_card(self.model, source, lineage, self.name)
        for _, origin in lineage.origins:
            copy_licence(Path(origin), folder)
        (folder / CARD).write_text(card_text(card), encoding="utf-8")
        files = sorted(folder.iterdir())
        config, gguf = read_json(folder / "config.json"), None
        if self.gguf is not None:
            gguf = write_gguf(folder, self.gguf, name=card.name, licence=card.licence)
        return {
            "schema": 1,
            "model": self.model,
            "folder": str(self.out),
            "name": card.name,
            "architecture": card.architecture,
            "non_embedding": card.non_embedding,
            "parameters": card.total,
            "dtype": str(source.config.dtype).removeprefix("torch."),
            "bytes": sum(path.stat().st_size for path in files),
            "files": [path.name for path in files],
            "teacher": card.teacher,
            "licence": {"id": card.licence.id, "source": card.licence.source},
            "chat_template": card.has_chat_template,
            "records": [str(path) for path in lineage.paths],
            "vllm": check_vllm(source.shape, source.config.dtype, config),
            "gguf": gguf,
            "push": None,
            "logits_not_compared": check_logits(source, folder, self.gguf),
        }
