"""Checks of settings that contradict each other; each value is in its own range."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

from fastbert.config import ModernBertConfig, OptimizerConfig, RateConfig, RunConfig, Weights
from fastbert.errors import InputError


def check_config(
    config: RunConfig, source: str, sources: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Raise InputError for values that contradict each other.

    Args:
        config: the settings; each value is in its own range.
        source: the recipe, for messages.
        sources: where the keys come from that are not from `source`.
    """

    def where(key: str) -> str:
        return sources.get(key, source)

    _check_data(config, where)
    _check_phases(config, where)
    model, objective, batch = config.model, config.objective, config.batch
    if model.hidden_size % model.num_attention_heads:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.num_attention_heads = "
            f"{model.num_attention_heads} does not divide model.hidden_size = {model.hidden_size}"
        )
    if model.head_size % 8:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.hidden_size / "
            f"model.num_attention_heads = {model.head_size}; must be a multiple of 8"
        )
    lengths = [(f"phase {i}: ", p.batch.max_length) for i, p in enumerate(config.phase, 1)]
    for place, length in [("", batch.max_length), *lengths]:
        if length and length > model.max_position_embeddings:
            hint = "lower the one or raise the other"
            if config.init is not None and not isinstance(model, ModernBertConfig):
                hint += (
                    f'; if init = {config.init!r} is a ModernBERT, set model.type = "modernbert"'
                )
            raise InputError(
                f"{where(place + 'batch.max_length')}: {place}batch.max_length = {length} is more "
                f"than model.max_position_embeddings = {model.max_position_embeddings}; {hint}"
            )
        if length and batch.micro_batch_tokens < length:
            raise InputError(
                f"{where('batch.micro_batch_tokens')}: batch.micro_batch_tokens = "
                f"{batch.micro_batch_tokens} is less than {place}batch.max_length = {length}; "
                "the longest sequence must fit"
            )
    if objective.pairs and isinstance(model, ModernBertConfig):
        raise InputError(
            f"{where('objective.kind')}: objective.kind = {objective.kind!r} with "
            'model.type = "modernbert"; must be "mlm": ModernBERT has no token types to tell the '
            "sentences of a pair apart, and no head for pairs"
        )
    if objective.pairs and objective.segments == "windows":
        raise InputError(
            f'{where("objective.segments")}: objective.segments = "windows" with objective.kind = '
            f'"{objective.kind}"; windows have no pairs: set objective.kind = "mlm", or segments '
            'to "fill"'
        )
    if objective.mask_token + objective.random_token > 1:
        raise InputError(
            f"{where('objective.random_token')}: objective.mask_token + "
            f"objective.random_token = {objective.mask_token + objective.random_token:g}; "
            "must be 1 at most"
        )
    horizon = {
        "steps": config.stop.steps or config.stop.epochs,
        "tokens": config.stop.tokens,
        "seconds": config.stop.seconds,
    }
    others = any(horizon[k] for k in horizon if k != config.schedule.over)
    flat = config.schedule.decay == "constant" and config.schedule.warmup == 0
    if (
        not horizon[config.schedule.over]
        and not flat
        and (others or config.schedule.over != "steps")
    ):
        key = (
            "stop.steps or stop.epochs"
            if config.schedule.over == "steps"
            else f"stop.{config.schedule.over}"
        )
        raise InputError(
            f'{where("schedule.over")}: schedule.over = "{config.schedule.over}" needs {key}: '
            "the learning rate follows it to the end of the run"
        )
    schedules = [(f"phase {i}: ", p.schedule) for i, p in enumerate(config.phase, 1)]
    for place, schedule in [("", config.schedule), *schedules]:
        if schedule and schedule.decay == "wsd" and schedule.warmup + schedule.cooldown > 1:
            raise InputError(
                f"{where(place + 'schedule.cooldown')}: {place}schedule.warmup + "
                f"schedule.cooldown = {schedule.warmup + schedule.cooldown:g}; must be 1 at most"
            )
        if (
            schedule
            and schedule.decay != "wsd"
            and schedule.cooldown_shape != RateConfig.cooldown_shape
        ):
            raise InputError(
                f"{where(place + 'schedule.cooldown_shape')}: {place}schedule.cooldown_shape = "
                f'"{schedule.cooldown_shape}" with schedule.decay = "{schedule.decay}", which has '
                'no cooldown; set schedule.decay = "wsd", or leave cooldown_shape out'
            )
    optimizer = config.optimizer
    if optimizer.name not in ("muon", "sgd") and optimizer.momentum != OptimizerConfig.momentum:
        raise InputError(
            f"{where('optimizer.momentum')}: optimizer.momentum = {optimizer.momentum:g} with "
            f'optimizer.name = "{optimizer.name}", which takes betas; leave momentum out, or set '
            'optimizer.name to "muon" or "sgd"'
        )
    if optimizer.name == "muon" and optimizer.momentum == 1:
        raise InputError(
            f"{where('optimizer.momentum')}: optimizer.momentum = 1 with "
            'optimizer.name = "muon"; must be below 1'
        )
    if config.runtime.recompute and config.runtime.cuda_graphs:
        raise InputError(
            f"{where('runtime.recompute')}: runtime.recompute = true does not go with "
            "runtime.cuda_graphs = true; set one of them to false"
        )
    if config.stop.min_delta and not config.stop.patience:
        raise InputError(
            f"{where('stop.min_delta')}: stop.min_delta = {config.stop.min_delta} "
            "needs stop.patience"
        )


def _check_data(config: RunConfig, where: Callable[[str], str]) -> None:
    """Check the sources of a mixture and their weights."""
    if isinstance(config.data, str):
        if config.weights is not None:
            raise InputError(
                f"{where('weights')}: weights = {config.weights!r}, but data is one dataset; "
                "weights need data = [{path = ...}, {path = ...}]"
            )
        return
    sources = config.data
    if not sources:
        raise InputError(f"{where('data')}: data is an empty list; name a dataset")
    paths = [source.path for source in sources]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise InputError(f"{where('data')}: data names {twice!r} twice; give it one larger weight")
    weighted = [source.weight is not None for source in sources]
    if config.weights is not None and any(weighted):
        raise InputError(
            f"{where('weights')}: weights = {config.weights!r}, and data {1 + weighted.index(True)}"
            " has a weight too; remove one of them"
        )
    if any(weighted) and not all(weighted):
        number = 1 + weighted.index(False)
        raise InputError(
            f"{where('data')}: data {number} ({paths[number - 1]}) has no weight, and others have; "
            'give each source one, or none and weights = "size^0.7"'
        )
    _check_weights(config.weights, len(sources), "weights", where("weights"))
    if all(weighted) and not sum(source.weight or 0.0 for source in sources):
        raise InputError(f"{where('data')}: all weights of data are 0; raise one")


def _check_weights(weights: Weights | None, sources: int, key: str, where: str) -> None:
    if isinstance(weights, tuple) and len(weights) != sources:
        raise InputError(
            f"{where}: {key} has {len(weights)} numbers, and data has {sources} sources; "
            "give one number for each"
        )
    if isinstance(weights, tuple) and not sum(weights):
        raise InputError(f"{where}: {key}: all of them are 0; raise one")


def _check_phases(config: RunConfig, where: Callable[[str], str]) -> None:
    """Check the phases of a run against each other and against the stop conditions."""
    stop, place = config.stop, where("phase")
    if not config.phase:
        return
    if not (stop.steps or stop.tokens or stop.seconds) or stop.epochs:
        raise InputError(
            f"{place}: a recipe with phases needs stop.steps, stop.tokens or stop.seconds, and no "
            "stop.epochs: an epoch has another number of examples where max_length or weights are "
            "others"
        )
    ends: dict[str, int] = {}
    for number, phase in enumerate(config.phase, 1):
        name = f"{place}: phase {number}"
        if phase.steps and phase.tokens:
            raise InputError(f"{name} has steps and tokens; keep one, its end")
        if not phase.has_end and number < len(config.phase):
            raise InputError(
                f"{name} has no end; give it steps or tokens, counted from the start of the run "
                "(only the last phase may last until the run stops)"
            )
        for unit, end in (("steps", phase.steps), ("tokens", phase.tokens)):
            if end and end <= ends.get(unit, 0):
                raise InputError(
                    f"{name}: {unit} = {end}, where an earlier phase ends at {ends[unit]}; ends "
                    "are counted from the start of the run"
                )
            ends |= {unit: end} if end else {}
        if phase.weights is not None:
            if len(config.sources) == 1:
                raise InputError(
                    f"{name}: weights = {phase.weights!r}, but data is one dataset; weights need "
                    "data = [{path = ...}, {path = ...}]"
                )
            _check_weights(phase.weights, len(config.sources), f"phase {number}: weights", place)
        if phase.batch.warmup_tokens and (number == 1 or not phase.batch.sequences):
            raise InputError(
                f"{name}: batch.warmup_tokens = {phase.batch.warmup_tokens} needs batch.sequences "
                "in the same phase, and a phase before it, from whose size the batch grows"
            )
        if phase.schedule and not (phase.has_end or stop.steps or stop.tokens):
            raise InputError(
                f"{name} has a schedule and no end that is known in advance; give it steps or "
                "tokens, or the run stop.steps or stop.tokens"
            )
