"""A recipe as the arguments of `transformers.Trainer`."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from philens.training.recipe import Recipe


def trainer_arguments(recipe: Recipe, folder: Path, passes: int) -> TrainingArguments:
    """The arguments of a `Trainer`.

    Args:
        passes: forward passes of a step that this process makes.
    """
    train, optimizer = recipe.train, recipe.optimizer
    decay = {"num_decay_steps": round(train.steps * optimizer.decay), "decay_type": "linear"}
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("linear", {}),
        "cosine": ("cosine", {}),
        "wsd": ("warmup_stable_decay", decay),
    }
    schedule, options = schedules[optimizer.schedule]
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=passes,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.clip,
        optim="adamw_torch",
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 1,
        dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        ddp_find_unused_parameters=_may_be_unused(recipe),
        remove_unused_columns=False,
        report_to="none",  # trackers are callbacks
        run_name=recipe.name,
        disable_tqdm=True,
    )


def _may_be_unused(recipe: Recipe) -> bool:
    """Whether a pass may leave parameters that are trained without a gradient, for which DDP must look."""
    trains_base = recipe.model.base is None or not recipe.model.frozen
    observes = recipe.phi is not None and recipe.phi.mode == "observe"
    waits = recipe.phi_schedule.start_step > 0
    return waits or (trains_base and (observes or recipe.model.base is not None))


def wants_bf16(recipe: Recipe) -> bool:
    """Whether to compute in bfloat16: as the recipe says, or where it is fast on the device at hand."""
    if recipe.train.precision != "auto":
        return recipe.train.precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.backends.mps.is_available() or bool(torch.cpu._is_avx512_bf16_supported())
