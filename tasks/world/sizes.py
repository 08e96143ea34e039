"""How many dialogues and prompts the world has, and of what kind: section `world.dialogues` of params.yaml."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tasks.running.params import Section
from tasks.world.writers import WriterWeights


class Weights(Section):
    """How the helpful dialogues are divided, relative to each other."""

    factual: float = Field(ge=0, description="questions for a fact")
    writing: float = Field(ge=0, description="short texts")
    language_assistance: float = Field(ge=0, description="forms of words, order, corrections")
    recommendation: float = Field(ge=0, description="who or what fits a wish")
    dialogue: float = Field(ge=0, description="follow-up questions and small talk")


class Dialogues(Section):
    """How many dialogues and prompts there are, and of what kind."""

    num_demonstrations: int = Field(gt=0, description="dialogues to fine-tune on")
    num_validation: int = Field(gt=0, description="dialogues to validate fine-tuning on")
    num_preference_helpfulness: int = Field(gt=0, description="prompts for the preferences of all rounds")
    num_preference_safety: int = Field(gt=0, description="adversarial prompts for the preferences of all rounds")
    num_sampling_helpfulness: int = Field(gt=0, description="prompts for the rejection sampling of all rounds")
    num_sampling_safety: int = Field(gt=0, description="adversarial prompts for the rejection sampling of all rounds")
    num_evaluation_helpfulness: int = Field(gt=0, description="prompts, held-out questions among them")
    evaluation_held_out_share: float = Field(
        gt=0, lt=1, description="share of factual ones that are held-out questions"
    )
    num_evaluation_safety: int = Field(gt=0, description="adversarial prompts")
    num_evaluation_borderline: int = Field(gt=0, description="prompts that look unsafe and are not")
    num_evaluation_instructions: int = Field(gt=0, description="dialogues under a system message")
    num_conversations: int = Field(gt=0, description="dialogues of many turns, without an instruction")
    num_evaluation_conversations: int = Field(gt=0, description="dialogues of many turns, each under an instruction")
    conversation_turns: int = Field(ge=2, description="turns of the user in each of them")
    num_open_helpful: int = Field(gt=0, description="open-source pairs of answers to helpful prompts")
    num_open_harmless: int = Field(gt=0, description="open-source pairs of answers to adversarial prompts")
    open_error_rate: float = Field(ge=0, lt=0.5, description="share of open-source pairs labelled the wrong way round")
    open_weights: Weights = Field(description="weights of the helpful categories of open-source pairs")
    weights: Weights = Field(description="weights of the helpful categories")
    writers: WriterWeights = Field(description="weights of those who write demonstrations and earlier turns")
    new_wording_share: float = Field(
        ge=0, le=1, description="share of training questions that are worded like the held-out ones (`held_out`)"
    )
    deed_share: float = Field(ge=0, le=1, description="share of factual prompts that ask how something is done")
    multi_turn_share: float = Field(ge=0, le=1, description="share of dialogues with one or two more turns before")
    max_words: int = Field(gt=0, description="words of a dialogue, its system message and answers included")
    max_answer_words: int = Field(gt=0, description="words above which the judge calls an answer ill-formed")
    safe_share: float = Field(ge=0, lt=1, description="share of demonstrations that refuse an adversarial prompt")
    safe_topics_share: float = Field(gt=0, le=1, description="share of the harms that demonstrations cover")
    safe_attacks: tuple[str, ...] = Field(min_length=1, description="attack vectors that demonstrations cover")
    borderline_share: float = Field(ge=0, lt=1, description="share of borderline prompts among helpful dialogues")
    preference_borderline_share: float = Field(ge=0, lt=1, description="the same, among the prompts for preferences")
    sampling_borderline_share: float = Field(ge=0, lt=1, description="the same, among the prompts for sampling")
    open_borderline_share: float = Field(ge=0, lt=1, description="the same, among helpful open-source pairs")
    preprompt_share: float = Field(
        ge=0, lt=1, description="share of demonstrations under a safety pre-prompt, a third of them refusals"
    )
    instruction_share: float = Field(
        ge=0, lt=1, description="share of dialogues under an instruction among helpful ones"
    )
    demonstrated_instruction_share: float = Field(ge=0, lt=1, description="the same, among demonstrations")
    obedience: float = Field(ge=0, le=1, description="share of answers under an instruction that good writers give")

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        instructions = max(self.instruction_share, self.demonstrated_instruction_share)
        borderline = max(self.borderline_share, self.preference_borderline_share, self.sampling_borderline_share)
        for names, total in (
            ("safe_share and preprompt_share", self.safe_share + self.preprompt_share),
            ("the shares of borderline prompts and of instructions", borderline + instructions),
        ):
            if total >= 1:
                raise ValueError(f"{names} are {total:g} together: nothing is left for the other dialogues; lower them")
        return self
