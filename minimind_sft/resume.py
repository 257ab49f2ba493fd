"""What a checkpoint says of its run, and where that run stands, as Lightning's loops want to hear it.

The YAML and the command line win over a checkpoint in how to go on (learning rate, decay, ...); every difference is
told. What would make it another run is refused: another base, another model, other data.

Every window is exactly one optimizer step, so the number of steps alone says which window comes next. Lightning's own
counters, in contrast, depend on the hook that the checkpoint was written in, on the number of micro-batches per
window and on whether an epoch had just ended (a position equal to the length makes the next epoch empty, and the run
"succeeds"). They are therefore rewritten when a checkpoint is loaded.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from minimind_sft.checkpoint_files import OURS
from minimind_sft.forgetting import OWN_CHATS, PRETRAIN, Reading
from minimind_sft.identity import MEASURED, check_measured, check_training, measured_anew, of_measured, of_training
from minimind_sft.optimizing import bases_in
from minimind_sft.terms import ReplayKL

if TYPE_CHECKING:
    from minimind_sft.module import SFTModule


def note(module: SFTModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint what a run needs to go on from it."""
    checkpoint["hyper_parameters"] = {"model_config": asdict(module.model.config)}
    checkpoint[OURS] = {
        "base_sha256": module.start.sha256,
        "baseline": asdict(module.baseline) if module.baseline else None,
        "plan": of_training(module.data),
        "measured": of_measured(module.data),
        "settings": settings(module),
        "guard": module.guard.state_dict(),
        "fisher_tokens": module.holding.fisher_tokens,
        "weights": {term.name: term.weight for term in module.holding.terms if term.adapts},
    }


def take_over(module: SFTModule, checkpoint: dict[str, Any]) -> None:
    """Take over the baseline; for `fit`, find the window that comes next.

    Raises:
        ValueError: a checkpoint of another base, of another model, or of other data.
    """
    ours = checkpoint[OURS]
    if ours["base_sha256"] != module.start.sha256:
        raise ValueError(
            f"the checkpoint was trained from another base (SHA-256 {str(ours['base_sha256'])[:12]}, model.weights has "
            f"{str(module.start.sha256)[:12]}); its forgetting cannot be measured against this one. Set model.weights "
            "to the base it started from, or start a new run from the checkpoint with model.weights"
        )
    _check_config(module, checkpoint["hyper_parameters"]["model_config"])
    module.baseline = Reading(**ours["baseline"]) if ours["baseline"] else None
    measured = ours.get("measured", of_measured(module.data))  # older checkpoints do not tell
    if module.trainer.state.fn == "fit":
        check_training(module.data, ours["plan"])
        check_measured(module.data, measured)
        _check_basis(module, ours.get("fisher_tokens", 0))
        module.holding.go_on_in(bases_in(checkpoint["optimizer_states"][0], module.model))
        plan = module.data.plan
        _tell_differences(module, ours["settings"])
        module.guard.load_state_dict(ours["guard"])
        given = ours["settings"].get("model.replay_weight", module.holding.replay_weight)
        for term in module.holding.terms:
            if term.adapts and (given == module.holding.replay_weight or term.name != ReplayKL.name):  # else anew
                term.weight = ours.get("weights", {}).get(term.name, term.weight)
        module.data.start_step = set_progress(checkpoint, windows=plan.windows, accumulate=plan.accumulate)
    elif module.trainer.state.fn == "validate" and module.baseline:
        module.baseline = _comparable(module, module.baseline, measured)


def settings(module: SFTModule) -> dict[str, Any]:
    """What may differ in a run that resumes."""
    trainer = module.trainer
    algorithm = trainer.gradient_clip_algorithm
    return {
        "model.learning_rate": module.learning_rate,
        "model.warmup_ratio": module.optimization.warmup_ratio,
        "model.min_lr_ratio": module.optimization.min_lr_ratio,
        "model.weight_decay": module.optimization.weight_decay,
        "model.decay_all": module.optimization.decay_all,
        "model.replay_loss": module.holding.replay_loss,
        "model.replay_weight": module.holding.replay_weight,
        "model.replay_target": module.holding.replay_target,
        "model.prior_tokens": module.holding.prior_tokens,
        "model.l2_sp": module.holding.l2_sp,
        "model.freeze": module.frozen,
        "model.aux_scope": module.aux_scope,
        "model.max_forgetting": module.max_forgetting,
        "model.terms": [
            term.name if term.adapts else f"{term.name} of weight {term.weight:g}" for term in module.holding.terms
        ],
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.max_steps": trainer.max_steps,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": algorithm.value if algorithm else "norm",
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
    }


def _comparable(module: SFTModule, baseline: Reading, saved: dict[str, list[Any]]) -> Reading:
    """The base's reading without what is measured on other documents now."""
    losses = {PRETRAIN: "pretrain_loss", OWN_CHATS: "own_chat_loss"}
    changed = [name for name in measured_anew(module.data, saved) if name in losses]
    for name in changed:
        if name in module.data.evaluation and module.trainer.is_global_zero:
            print(
                f"{MEASURED[name]}: not what the base was measured on in that run, so no forgetting is told; for that: "
                "python -m minimind_sft compare",
                flush=True,
            )
    unknown: dict[str, Any] = {losses[name]: None for name in changed}
    return replace(baseline, **unknown)


def _check_config(module: SFTModule, saved: dict[str, Any]) -> None:
    """Weights fit another theta, eps or number of heads as well, and would then be another model."""
    changed = [
        f"{name} was {saved.get(name)}, is {now}"
        for name, now in asdict(module.model.config).items()
        if saved.get(name) != now
    ]
    if changed:
        raise ValueError(
            f"the checkpoint is of another model ({'; '.join(changed)}); set the keys under model as they were"
        )


def _check_basis(module: SFTModule, before: int) -> None:
    """Moments do not turn with the basis that they are kept in."""
    now = module.holding.fisher_tokens
    if now != before:
        raise ValueError(
            f"the checkpoint's optimizer has a basis from {before} tokens, and model.fisher_tokens is {now}; set "
            f"it to {before}, or start a new run from the checkpoint with model.weights"
        )


def _tell_differences(module: SFTModule, saved: dict[str, Any]) -> None:
    now = settings(module)
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in now.items() if saved.get(name, value) != value]
    if changed and module.trainer.is_global_zero:
        print(f"settings that differ from the checkpoint's: {', '.join(changed)}", flush=True)
        if any(saved.get(name) != now[name] for name in ("trainer.max_epochs", "trainer.max_steps")):
            print(f"the learning rate now falls until step {module.total_steps:,}", flush=True)


def set_progress(checkpoint: dict[str, Any], *, windows: int, accumulate: int) -> int:
    """Rewrite the loop counters of a checkpoint to the window that comes next.

    Args:
        checkpoint: as Lightning wrote it; changed in place.
        windows: of an epoch.
        accumulate: micro-batches per window and rank, in the run that resumes.

    Returns:
        Optimizer steps done.
    """
    step = int(checkpoint["global_step"])
    epoch, window = divmod(step, windows)
    position, total = window * accumulate, step * accumulate
    checkpoint["epoch"] = epoch
    loops = checkpoint["loops"]["fit_loop"]
    batch = loops["epoch_loop.batch_progress"]
    batch["current"] = dict.fromkeys(batch["current"], position)
    batch["total"] = dict.fromkeys(batch["total"], total)
    batch["is_last_batch"] = False
    started = epoch + 1 if window else epoch  # an epoch counts as started once its first window is done
    for counters in (loops["epoch_progress"]["current"], loops["epoch_progress"]["total"]):
        counters.update(ready=started, started=started, processed=epoch, completed=epoch)
    return step
