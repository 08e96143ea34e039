"""Train a round's reward model for helpfulness, `reward_helpfulness@v1`; the code is in tasks/learning/reward.py."""

from tasks.learning.reward import Params, run
from tasks.running.stage import start

if __name__ == "__main__":
    start(Params, run)
