"""The forms of export: one frozen dataclass each, listed in `FORMATS`. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from fedpeft.adapters import Adapter
from fedpeft.adapters.folder import contents, write_folder
from fedpeft.config import build
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from fedpeft.bases import Base


@dataclass(frozen=True)
class Export:
    """What is exported: the adapter, its version's files where it is one, and the base, loaded where form or check needs it."""

    adapter: Adapter
    base: Base | None = None
    files: Mapping[str, bytes] | None = None

    def loaded(self) -> Base:
        """The base. Raises `ConfigError` when none was given."""
        if self.base is None:
            raise ConfigError("export: this form needs the base; give --base where its name in the adapter is not found here")
        return self.base


@dataclass(frozen=True)
class Written:
    """What a form wrote, in lines for a person."""

    folder: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """How far what was written is from what is served: the largest ``difference`` of logits, or None where ``what`` was looked at."""

    what: str
    difference: float | None = None
    scale: float = 1.0
    allowed: float = 1e-3

    @property
    def same(self) -> bool:
        """Whether the difference is rounding: at most ``allowed`` of the largest logit."""
        return self.difference is None or self.difference <= self.allowed * max(self.scale, 1.0)

    @property
    def said(self) -> str:
        """For a person."""
        if self.difference is None:
            return self.what
        return f"{self.what} are at most {self.difference:.2e} off what is served (largest {self.scale:.3g})"


class Format(Protocol):
    """One form."""

    kind: ClassVar[str]

    @property
    def needs_base(self) -> bool:
        """Whether `write` needs the base's weights."""
        ...

    def write(self, export: Export, folder: Path) -> Written:
        """Make the new ``folder``. Raises `AdapterError` for what the form cannot say, `StorageError` when it cannot be written."""
        ...

    def check(self, export: Export, folder: Path) -> Checked:
        """Reload what was written without fedpeft and compare it with the adapter as it is served."""
        ...


@dataclass(frozen=True)
class Peft:
    """The Hugging Face PEFT folder, as adapters are stored here."""

    kind: ClassVar[str] = "peft"

    @property
    def needs_base(self) -> bool:
        """The tensors alone."""
        return False

    def write(self, export: Export, folder: Path) -> Written:
        """The folder that `peft.PeftModel.from_pretrained` reads, with manifest and signature where it is a version."""
        write_folder(folder, export.files or contents(export.adapter))
        return Written(folder, (f"load it with peft.PeftModel.from_pretrained(model, {str(folder)!r})",))

    def check(self, export: Export, folder: Path) -> Checked:
        """Logits of stock peft on a freshly loaded base."""
        from fedpeft.exporting.checking import peft_check

        return peft_check(export, folder)


@dataclass(frozen=True)
class Merged:
    """A plain model with the adapter in its weights; on a quantized base, in its dequantized ones."""

    kind: ClassVar[str] = "merged"

    @property
    def needs_base(self) -> bool:
        """The weights to merge with."""
        return True

    def write(self, export: Export, folder: Path) -> Written:
        """The folder that `from_pretrained` reads, tokenizer and all. Raises `AdapterError` where the adapter is no change of weights."""
        from fedpeft.exporting.merged import write

        return write(export, folder)

    def check(self, export: Export, folder: Path) -> Checked:
        """Logits of the model as transformers loads it."""
        from fedpeft.exporting.checking import merged_check

        return merged_check(export, folder)


@dataclass(frozen=True)
class Vllm:
    """A LoRA folder as vLLM loads it; ``max_rank`` is the server's ``--max-lora-rank``, one of its list, or the least that fits."""

    kind: ClassVar[str] = "vllm"

    max_rank: Annotated[int, Field(ge=1)] | None = None

    @property
    def needs_base(self) -> bool:
        """The tensors alone."""
        return False

    def write(self, export: Export, folder: Path) -> Written:
        """The folder for ``--lora-modules``. Raises `AdapterError` naming what vLLM's loader does not take."""
        from fedpeft.exporting.vllm import write

        return write(export, folder, self.max_rank)

    def check(self, export: Export, folder: Path) -> Checked:
        """Logits of stock peft on a freshly loaded base: the folder is a PEFT folder too."""
        from fedpeft.exporting.checking import peft_check

        return peft_check(export, folder)


@dataclass(frozen=True)
class Gguf:
    """A GGUF LoRA by llama.cpp's ``convert_lora_to_gguf.py``, named by ``converter`` or found on PATH."""

    kind: ClassVar[str] = "gguf"

    converter: str = "convert_lora_to_gguf.py"
    outtype: str = "f32"

    @property
    def needs_base(self) -> bool:
        """The converter reads the base's config itself."""
        return False

    def write(self, export: Export, folder: Path) -> Written:
        """``adapter.gguf`` in the folder. Raises `ConfigError` when the converter is not there, `AdapterError` when it fails."""
        from fedpeft.exporting.gguf import write

        return write(export, folder, self.converter, self.outtype)

    def check(self, export: Export, folder: Path) -> Checked:
        """Header and tensors of the file: what is in it is what was given to the converter."""
        from fedpeft.exporting.gguf import check

        return check(export, folder)


FORMATS: dict[str, type[Format]] = {"peft": Peft, "merged": Merged, "vllm": Vllm, "gguf": Gguf}


def make_format(table: Any) -> Format:
    """A form from its table, such as ``{"kind": "vllm", "max_rank": 64}``. Raises `ConfigError`."""
    try:
        return build(FORMATS, table, "format")
    except ValueError as fault:
        raise ConfigError(f"export: {fault}") from None
