"""Where a model comes from."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSource:
    """A base model, and a PHi layer for it.

    Attributes:
        model: folder, GGUF file or Hub id of the base; or a run folder, or `smollm2`, which have a layer.
        adapter: folder or Hub id of the layer; None takes that of the model, where it has one.
        revision: revision of the base on the Hub.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code that the base's repository brings.
        quantization: precision of the base's weights, when they are loaded.
    """

    model: str = "smollm2"
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    quantization: Literal["int8", "int4"] | None = None

    def load_base(self, tokenizer: bool = True) -> tuple[Any, Any]:
        """The base alone and its tokenizer, as `philens.load_pretrained` has them."""
        from philens.bases.hub import load_pretrained

        return load_pretrained(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
            tokenizer=tokenizer,
        )
