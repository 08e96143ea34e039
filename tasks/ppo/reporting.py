"""Report a run of PPO: its curves, the tries on held-out prompts, the last answers to them."""

from __future__ import annotations

from model.network.transformer import num_parameters
from tasks.ppo.training import Training
from tasks.running.files import write_lines
from tasks.running.plots import Plot

PLOTS = {  # name of the plot: its title, the label of its values, and which of the figures of training it shows
    "rewards": ("Reward of sampled responses", "log-odds (nats)", ["reward", "helpfulness/reward", "safety/reward"]),
    "kl": ("KL from the starting policy", "nats per response", ["kl", "kl_k3"]),
    "entropy": ("Entropy of the policy", "nats per token", ["entropy"]),
    "length": ("Length of responses", "tokens", ["length"]),
    "shares": ("Shares", "share", ["finished", "safety_branch", "clip_share", "explained_variance"]),
    "value": ("Loss of the value model", "squared error, halved", ["value/loss"]),
}
HELD_OUT = Plot("curves", "Objective on held-out prompts", "iteration", "value", "iteration", "deviations", "measure")


def report(training: Training) -> dict[str, float]:
    """Write the curves and the last answers; return the figures."""
    import pandas

    stage, progress = training.stage, training.progress
    first, best = progress.validation[0], progress.notes["best"]
    chosen = next(row for row in progress.validation if row["step"] == best["step"])
    if stage.rank == 0:
        write_lines(
            stage.output / "samples.jsonl", [row for row in progress.notes["samples"] if row["step"] == best["step"]]
        )
        for name, (title, label, measures) in PLOTS.items():
            rows = [
                {"iteration": row["step"], "measure": measure, "value": row[measure]}
                for measure in measures
                for row in progress.train
            ]
            plot = Plot("curves", title, "iteration", "value", "iteration", label, "measure")
            stage.plot(name, pandas.DataFrame(rows), plot)
        tries = [
            {"iteration": row["step"], "measure": measure, "value": row[measure]}
            for measure in ("objective", "reward", "helpfulness/reward", "safety/reward")
            for row in progress.validation
            if measure in row
        ]
        stage.plot("held_out", pandas.DataFrame(tries), HELD_OUT)
    last = progress.train[-1]
    steps = max(0, progress.step - stage.params.value_warmup_iterations) * stage.params.steps_an_iteration
    return {
        "parameters": num_parameters(training.policy.module.config),
        "iterations": progress.step,
        "steps": steps,  # of the policy: a control takes as many
        "best_iteration": best["step"],
        "prompts": len(training.prompts),
        "held_out_prompts": len(training.held_out),
        "responses": progress.counts["responses"],
        "tokens": progress.counts["tokens"],
        **{f"train/{name}": last[name] for name in ("reward", "kl", "entropy", "length", "explained_variance")},
        **{f"validation/{name}": value for name, value in chosen.items() if name not in ("step", "tokens")},
        "validation/gain": chosen["objective"] - first["objective"],
    }
