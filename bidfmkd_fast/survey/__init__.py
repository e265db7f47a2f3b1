"""Survey the APIs: ask all of them once about the same procedural pictures, and distil what they
answer into one backbone.

- `config`: the settings of the survey.
- `pictures`: the shared pictures, drawn at the size that each API takes.
- `answers`: the answers of one API, kept on disk as they come.
- `choice`: chooses the pictures of the second round by what the first has taught.
- `ask`: asks one API about the pictures that it has not answered yet.
- `backbone`: splits a meta-model into its features and its last linear layer.
- `jitter`: turns, scales and shifts what the backbone sees of a picture.
- `joint_distillation`: trains the features with one head per API.
"""

from bidfmkd_fast.survey.config import SurveyConfig

__all__ = ["SurveyConfig"]
