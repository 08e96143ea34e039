"""Train the round's reward model for safety: `reward_safety@v1`; all of it is in tasks/learning/reward.py."""

from tasks.learning.reward import Params, run
from tasks.running.stage import start

if __name__ == "__main__":
    start(Params, run)
