"""Credentials have no place in what a run writes: configs that hold one are refused, messages that would show one have it blotted out.

Configs are copied into config.yaml, into every checkpoint and into reports, which are made to be passed on; so a token belongs into the environment
(HF_TOKEN, GPTOSS_JAX_API_KEY), which is never written anywhere. Recognised are URLs with a password or token before the host, and the tokens of the
services that people use beside this library, by the prefixes that those gave them so that programs can do this.
"""

import re

_IN_URL = re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)")  # one slash is left where the address was taken for a path
# Hugging Face, OpenAI and Anthropic, GitHub (classic, fine-grained), GitLab, AWS key ids, Google, Slack
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{20,}|sk-(?=[a-z0-9_-]*[A-Z])(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|xox[abprs]-[A-Za-z0-9-]{10,})"
)
BLOT = "***"


def redacted(text: str) -> str:
    """The text with *** in the place of every credential."""
    return _TOKEN.sub(BLOT, _IN_URL.sub(rf"\1{BLOT}", text))


def holds_secret(text: str) -> bool:
    return redacted(text) != text
