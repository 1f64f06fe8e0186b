"""Multi-token heads that models bring along, as DeepSeek-V3 does: transformers leaves them out when it loads
a model, and reads them from the same checkpoint when asked."""

import copy
from typing import Any

from torch import nn

from philens.bases import hub
from philens.bases.facts import own_head_keys, text_config, unwrapped
from philens.support.errors import AdapterError, ConfigError


def load_own_head(base: nn.Module) -> Any:
    """The multi-token head of a base, an `MtpModel` of transformers; its embeddings are the base's.

    Args:
        base: loaded from a folder, or from the Hub, that still has the checkpoint.

    Raises:
        ConfigError: it brings none, or one of another kind.
    """
    from transformers import __version__
    from transformers.modeling_layers import MtpModel

    def none(why: str) -> ConfigError:
        return ConfigError(
            f"{type(base).__name__} brings no multi-token head that can be measured ({why}); train a shallow "
            "head, which any model can have."
        )

    if not getattr(text_config(base), "num_mtp_layers", None):
        raise none("its configuration names none")
    model = copy.copy(unwrapped(base))  # which may be told other things
    model.config = copy.deepcopy(model.config)
    if not (name := model.config._name_or_path):
        raise none("it was not loaded from a checkpoint")
    # transformers knows the names by the number of blocks that released models have.
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = [*known, own_head_keys(model.config)]
    try:
        commit = getattr(model.config, "_commit_hash", None)
        folder, _ = hub.find(name, ("*",), "model", "config.json", revision=commit, local_only=True)
        model.config._name_or_path = str(folder)
        with hub.quiet():
            head = MtpModel.from_pretrained(model)
    except (AdapterError, OSError, RuntimeError, ValueError) as error:
        why = hub.reason(error)
        if "weights are missing" in str(error):
            some = f"transformers {__version__} does not find all its weights; a newer one may"
            why = "its checkpoint holds none" if ".eh_proj." in str(error) else some
        raise none(why) from error
    kinds = set(getattr(head.config, "layer_types", None) or ["full_attention"])
    plain = head.rotary_emb is not None and not (
        getattr(head, "has_per_layer_rope", False) or head.use_shared_post_norm
    )
    if kinds != {"full_attention"} or not plain or not hasattr(model.get_decoder(), "norm"):
        raise none("it is of another kind than DeepSeek-V3's")
    # A mask of any shape; the base's own attention may know others only.
    head.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    head.layers.requires_grad_(False)
    return head
