"""Writes tests/golden/preference.json: values, gradients and metrics of TRL's own preference losses on small tensors.

    launch/parity.sh            makes the environment and runs every make_*_golden.py
    python tests/parity/make_preference_golden.py             in that environment

TRL 1.16 writes its losses inside the trainers. They are called here as they stand (`DPOTrainer._compute_loss`,
`KTOTrainer._compute_loss`, `RewardTrainer.compute_loss`, `ORPOTrainer` and `CPOTrainer.get_batch_loss_metrics`) on a
namespace with the attributes that they read and on models that return given tensors; torch differentiates. DPO and KTO
are differentiated by token logprobs, ORPO and CPO by logits, rewards by scores.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import platform
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import torch
import transformers
import trl
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "preference.json"
FACTS = [
    "sigmoid ignores label_smoothing",
    "ipo and sigmoid_norm divide the f-divergence's score by the completion's length",
    "sft: mean over all chosen completion tokens of the batch",
    "use_weighting multiplies every term by w_chosen * w_rejected, the sft term by their mean",
    "rewards/* are beta * log-ratio whatever the f-divergence; in ORPO beta * mean logprob",
    "ORPO's nll is over prompt and completion, CPO's over the completion",
    "simpo: gamma / beta is taken from the difference before beta multiplies it",
    "nothing is clamped before exp but the exponent of alpha_divergence, at most 80",
]
LENGTHS = [[3, 5], [4, 2], [1, 4], [6, 6]]  # completion tokens of chosen and rejected
PROMPT = 2
DPO = {  # name -> what differs from the defaults below
    **{kind: {"loss_types": [kind]} for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair")},
    **{
        kind: {"loss_types": [kind]}
        for kind in ("sppo_hard", "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired")
    },
    "sigmoid_smoothed": {"loss_types": ["sigmoid"], "label_smoothing": 0.2},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.2},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
    "aot_smoothed": {"loss_types": ["aot"], "label_smoothing": 0.2},
    "aot_unpaired_smoothed": {"loss_types": ["aot_unpaired"], "label_smoothing": 0.2},
    "discopop_tau": {"loss_types": ["discopop"], "discopop_tau": 0.7},
    "sft": {"loss_types": ["sft"]},
    "rpo": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "mpo": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js": {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha": {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
    "alpha_1": {"loss_types": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "ipo_forward_kl": {"loss_types": ["ipo"], "f_divergence_type": "forward_kl"},
    "sigmoid_norm_js": {"loss_types": ["sigmoid_norm"], "f_divergence_type": "js_divergence"},
    "ipo_alpha": {"loss_types": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    "ld_dpo": {"loss_types": ["sigmoid"], "ld_alpha": 0.3},
    "wpo": {"loss_types": ["sigmoid"], "use_weighting": True},
}
DPO_DEFAULTS = {
    "loss_weights": None,
    "beta": 0.4,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
}
KTO = {
    "kto": {"loss_type": "kto"},
    "kto_weighted": {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "kto_negative_kl": {"loss_type": "kto", "twin_shift": -3.0},  # the mean of the twins below 0: z is 0
}
KTO_DEFAULTS = {"beta": 0.4, "desirable_weight": 1.0, "undesirable_weight": 1.0, "twin_shift": 0.0}
REWARD = {
    "plain": {},
    "margin": {"margin": [0.5, 0.0, 1.0, -0.5]},
    "centered": {"center": 0.1},
    "both": {"margin": [0.5, 0.0, 1.0, -0.5], "center": 0.01},
}
FREE = {
    "orpo": {"trainer": "orpo", "beta": 0.1},
    "orpo_strong": {"trainer": "orpo", "beta": 0.7},
    "cpo": {"trainer": "cpo", "loss_type": "sigmoid"},
    "cpo_smoothed": {"trainer": "cpo", "loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.5},
    "cpo_hinge": {"trainer": "cpo", "loss_type": "hinge"},
    "cpo_ipo": {"trainer": "cpo", "loss_type": "ipo"},
    "simpo": {"trainer": "cpo", "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "cpo_simpo": {"trainer": "cpo", "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0},
    "alphapo": {
        "trainer": "cpo",
        "loss_type": "simpo",
        "beta": 2.5,
        "simpo_gamma": 0.3,
        "cpo_alpha": 0.0,
        "alpha": 0.25,
    },
}
FREE_DEFAULTS = {"beta": 0.4, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0, "label_smoothing": 0.0}
LOGGED = ("rewards/", "logps/", "accuracy", "margin", "kl", "nll_loss", "log_odds", "mean_reward")


class Given(torch.nn.Module):
    """A model whose outputs are given."""

    is_gradient_checkpointing = False

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *args, **kwargs):
        return self.answer(**kwargs)


def main() -> None:
    torch.manual_seed(0)
    golden = {
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, trl, numpy)},
        "facts": FACTS,
        "dpo": dpo(),
        "kto": kto(),
        "reward": reward(),
        "free": free(),
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(dump(golden))
    print(f"wrote {GOLDEN.name}: {sum(len(golden[part]['cases']) for part in ('dpo', 'kto', 'reward', 'free'))} cases")


def accelerator() -> SimpleNamespace:
    same = lambda x: x
    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same)


def token_model(logprobs: torch.Tensor, log_sum_sq: torch.Tensor | None = None) -> Given:
    """Answers with these logprobs [rows, T-1] where a label stands, as transformers' fused head does."""

    def answer(labels, **kwargs):
        mask = labels[:, 1:] != -100
        zeros = torch.zeros(mask.shape)
        return SimpleNamespace(
            log_probs=torch.where(mask, logprobs, 0.0),
            log_sum_sq_probs=zeros if log_sum_sq is None else log_sum_sq,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    return Given(answer)


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rows of PROMPT prompt tokens and so many completion tokens, padded on the right."""
    width = PROMPT + max(lengths)
    column = torch.arange(width)
    real = column < PROMPT + torch.tensor(lengths)[:, None]
    return {
        "input_ids": torch.ones(real.shape, dtype=torch.long),
        "attention_mask": real.long(),
        "completion_mask": (real & (column >= PROMPT)).long(),
    }


def dpo() -> dict:
    """Rows: all chosen, then all rejected."""
    batch = batch_of([pair[0] for pair in LENGTHS] + [pair[1] for pair in LENGTHS])
    mask = batch["completion_mask"][:, 1:].bool()
    policy = torch.where(mask, -2 * torch.rand(mask.shape) ** 2 - 0.05, 0.0)
    reference = torch.where(mask, policy + 0.8 * torch.randn(mask.shape), 0.0).clamp(max=-0.01) * mask
    log_sum_sq = torch.where(mask, -1.2 * torch.rand(mask.shape), 0.0)
    cases = {}
    for name, differs in DPO.items():
        config = DPO_DEFAULTS | differs
        leaf = policy.clone().requires_grad_()
        trainer = SimpleNamespace(
            **{key: value for key, value in config.items() if key not in ("discopop_tau", "loss_weights")},
            loss_weights=config["loss_weights"] or [1.0] * len(config["loss_types"]),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=config["discopop_tau"]),
            model=token_model(leaf, log_sum_sq),
            ref_model=token_model(reference),
            precompute_ref_logps=False,
            **common(),
        )
        loss = DPOTrainer._compute_loss(trainer, trainer.model, dict(batch), return_outputs=False)
        cases[name] = result(config, loss, leaf, trainer._metrics["train"])
    inputs = {"mask": mask, "policy": policy, "reference": reference, "log_sum_sq": log_sum_sq}
    return {"lengths": LENGTHS, **listed(inputs), "cases": cases}


def kto() -> dict:
    """Five examples and their mismatched twins."""
    lengths, labels = [3, 5, 1, 4, 2], torch.tensor([True, False, True, True, False])
    batch = batch_of(lengths)
    twins = batch_of(lengths[1:] + lengths[:1])
    mask, twin_mask = (b["completion_mask"][:, 1:].bool() for b in (batch, twins))
    draw = lambda m: torch.where(m, -2 * torch.rand(m.shape) ** 2 - 0.05, 0.0)
    policy, reference, twin, ref_twin = draw(mask), draw(mask), draw(twin_mask), 1.7 * draw(twin_mask)
    batch |= {"label": labels, **{f"KL_{key}": value for key, value in twins.items()}}
    cases = {}
    for name, differs in KTO.items():
        config = KTO_DEFAULTS | differs
        leaf = policy.clone().requires_grad_()
        shifted = ref_twin - config["twin_shift"] * twin_mask
        trainer = SimpleNamespace(
            **config,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            model=two_batches(mask, leaf, twin),
            ref_model=two_batches(mask, reference, shifted),
            precompute_ref_logps=False,
            calculate_KL=config["loss_type"] == "kto",
            **common(),
        )
        trainer._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, trainer)
        loss = KTOTrainer._compute_loss(trainer, trainer.model, dict(batch), return_outputs=False)
        cases[name] = result(config, loss, leaf, trainer._metrics["train"])
    inputs = {"labels": labels, "mask": mask, "policy": policy, "reference": reference}
    return {**listed(inputs | {"twin_mask": twin_mask, "twin": twin, "ref_twin": ref_twin}), "cases": cases}


def two_batches(mask: torch.Tensor, logprobs: torch.Tensor, twin: torch.Tensor) -> Given:
    """token_model of the examples where their own labels are asked for, of the twins elsewhere."""
    own, other = token_model(logprobs), token_model(twin)
    return Given(lambda labels, **kwargs: (own if torch.equal(labels[:, 1:] != -100, mask) else other)(labels=labels))


def reward() -> dict:
    """Four pairs of scores, one of them tied."""
    scores = torch.tensor([1.5, -0.25, 0.75, 2.0, 0.5, 0.5, 0.75, -1.0])
    cases = {}
    for name, config in REWARD.items():
        leaf = scores.clone().requires_grad_()
        trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=config.get("center")), **common())
        trainer.model = Given(lambda **kwargs: SimpleNamespace(logits=leaf[:, None]))
        inputs = {"attention_mask": torch.ones(8, 3)}
        if "margin" in config:
            inputs["margin"] = torch.tensor(config["margin"])
        loss = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
        cases[name] = result(config, loss, leaf, trainer._metrics["train"])
    return {**listed({"scores": scores}), "cases": cases}


def free() -> dict:
    """ORPO, CPO and SimPO from logits: three pairs, a vocabulary of four. Rows: all chosen, then all rejected."""
    lengths = [3, 4, 1, 2, 4, 3]
    batch = batch_of(lengths)
    ids = torch.randint(0, 4, batch["input_ids"].shape)
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    sides = {"chosen": slice(0, 3), "rejected": slice(3, 6)}
    columns = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}
    rows = {f"{side}_{name}": column[part] for side, part in sides.items() for name, column in columns.items()}
    logits = 1.5 * torch.randn(*ids.shape, 4)
    cases = {}
    for name, differs in FREE.items():
        config = FREE_DEFAULTS | differs
        kind = {"orpo": ORPOTrainer, "cpo": CPOTrainer}[config["trainer"]]
        leaf = logits.clone().requires_grad_()
        trainer = SimpleNamespace(**config, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **common())
        for method in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
            if hasattr(kind, method):
                setattr(trainer, method, functools.partial(getattr(kind, method), trainer))
        trainer.concatenated_inputs, trainer.get_batch_logps = kind.concatenated_inputs, kind.get_batch_logps
        model = Given(lambda **kwargs: SimpleNamespace(logits=leaf))
        loss, metrics = kind.get_batch_loss_metrics(trainer, model, rows)
        cases[name] = result(config, loss, leaf, {key: [value] for key, value in metrics.items()})
    inputs = {"ids": ids, "mask": batch["completion_mask"], "real": batch["attention_mask"], "logits": logits}
    return {**listed(inputs), "cases": cases}


def common() -> dict:
    """Attributes that every trainer reads and that change nothing here."""
    return {
        "accelerator": accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }


def result(config: dict, loss: torch.Tensor, leaf: torch.Tensor, metrics: dict) -> dict:
    """One case: its settings, loss, gradient by the given tensor, and what TRL logs of it."""
    (gradient,) = torch.autograd.grad(loss, leaf)
    logged = {key: float(value[0]) for key, value in metrics.items() if key.startswith(LOGGED)}
    return {"config": config, "loss": loss.item(), **listed({"gradient": gradient}), "metrics": logged}


def listed(tensors: dict[str, torch.Tensor]) -> dict:
    """Lists of numbers, nine digits each: what fp32 holds."""
    round9 = lambda x: [round9(y) for y in x] if isinstance(x, list) else float(f"{x:.9g}") if x % 1 else int(x)
    return {key: round9(value.tolist()) for key, value in tensors.items()}


def dump(golden: dict) -> str:
    """JSON with a line for each input, and for each case's settings, gradient and metrics."""
    parts = [f'"{key}": {json.dumps(golden[key])}' for key in ("versions", "facts")]
    for part in ("dpo", "kto", "reward", "free"):
        inputs = [f'  "{key}": {json.dumps(value)}' for key, value in golden[part].items() if key != "cases"]
        cases = [
            f'   "{name}": {{\n' + ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in case.items()) + "}"
            for name, case in golden[part]["cases"].items()
        ]
        parts.append(f'"{part}": {{\n' + ",\n".join([*inputs, '  "cases": {\n' + ",\n".join(cases) + "}"]) + "}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    assert json.loads(text) == golden
    return text


if __name__ == "__main__":
    main()
