"""A PHi lens as a reward function of TRL's GRPOTrainer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from philens.reasoning.rules import Rule
from philens.reasoning.solutions import measure_replies
from philens.scoring.texts import Text, as_texts
from philens.support.errors import InputError
from philens.tasks.chat import content_text
from philens.tasks.rendering import Rendering, with_rendering

if TYPE_CHECKING:
    from philens.lens.model import PHiModel


class PHiReward:
    """What a rule looks at as reward: `GRPOTrainer(reward_funcs=PHiReward(lens, tokenizer), ...)`.

    The lens stands beside the policy and is not trained: it works on its own device, without gradients, and
    its modules keep the modes they have. Only what the rule needs is computed.

    Whether a higher phi is better is for your own data to say; see docs/ranking.md.

    Args:
        lens: a model with a PHi layer; not around the policy itself, whose weights change.
        tokenizer: the lens's, which need not be the policy's.
        rule: as in `philens.rank`; `lowest_` rewards with the negative of the column.
        batch_tokens: tokens read at once, padding included.
        window: as in `philens.score`, like `chat_options`, `system` and `bos`; these are to be those with
            which the policy is prompted.

    Raises:
        ConfigError: no rule; chat options that the template does not have, or no BOS.
    """

    def __init__(
        self,
        lens: "PHiModel",
        tokenizer: Any,
        rule: str | Rule = "highest_phi",
        *,
        batch_tokens: int = 4096,
        window: int | None = None,
        chat_options: Mapping[str, Any] | None = None,
        system: str | None = None,
        bos: bool = False,
    ) -> None:
        self.lens = lens
        self.tokenizer = with_rendering(tokenizer, Rendering(chat_options or {}, system, bos))
        self.rule = Rule.parse(rule) if isinstance(rule, str) else rule
        self.batch_tokens, self.window = batch_tokens, window
        self.__name__ = self.rule.name  # TRL logs the reward under it

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """The reward of each completion.

        Args:
            prompts: strings, or chats.
            completions: strings, or chats of one or more messages, of which the last is rewarded.
            columns: whatever else TRL gives; not used.

        Returns:
            The rule's sign times its column. A completion without a token has no metrics: it gets the lowest
            reward of the others (0 if there are none), so that silence never pays.

        Raises:
            InputError: a column that does not exist; or what `measure_replies` raises.
        """
        given = as_texts(prompts, "prompts"), as_texts(completions, "completions")
        pairs = [_as_pair(*pair) for pair in zip(*given, strict=True)]
        if not any(reply for _, reply in pairs):
            return [0.0] * len(pairs)
        table = measure_replies(
            self.lens,
            self.tokenizer,
            [prompt for prompt, _ in pairs],
            [reply for _, reply in pairs],
            metrics=self.rule.metrics or ("phi",),
            batch_tokens=self.batch_tokens,
            window=self.window,
        )
        rewards = self.rule.scores(table)
        return np.where(table["tokens"] > 0, rewards, np.nanmin(rewards)).tolist()


def _as_pair(prompt: Text, completion: Text) -> tuple[Text, str]:
    """What stands before the reply, and the reply."""
    if isinstance(completion, str):
        return prompt, completion
    last = completion[-1] if completion else None
    reply = content_text(last) if isinstance(last, Mapping) else None
    if isinstance(prompt, str) or reply is None:
        raise InputError(
            "A completion is a string, or after a chat a list of messages with role and content, "
            f"not {completion!r}."
        )
    return [*prompt, *completion[:-1]], reply
