"""A detector for detect-secrets: the tokens of Hugging Face, which this project's deployments hold."""

from __future__ import annotations

import re
from typing import ClassVar

from detect_secrets.plugins.base import RegexBasedDetector


class HuggingFaceTokenDetector(RegexBasedDetector):
    """Finds `hf_` and the 34 letters behind it, also without a name that says what it is."""

    secret_type = "Hugging Face Token"  # pragma: allowlist secret
    denylist: ClassVar[list[re.Pattern[str]]] = [re.compile(r"\bhf_[A-Za-z]{30,40}\b")]
