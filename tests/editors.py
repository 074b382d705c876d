"""What llama.vim and llama.vscode send to `/infill`, as their sources have it."""

from __future__ import annotations

from typing import Any

TEXTS = {
    "input_prefix": "def f(a):\n", "input_suffix": "\n    return b\n", "prompt": "    b = ",
    "input_extra": [{"filename": "x.py", "text": "a = b", "time": 1}],
}  # fmt: skip
TIMES = {"t_max_prompt_ms": 500, "t_max_predict_ms": 60000}
COMMON = {"top_k": 40, "stream": False, "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "n_predict": 8}
FIELDS = [
    "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms", "timings/prompt_per_second",
    "timings/predicted_n", "timings/predicted_ms", "timings/predicted_per_token_ms", "timings/predicted_per_second",
    "truncated", "tokens_cached",
]  # fmt: skip
VSCODE: dict[str, Any] = TEXTS | COMMON | TIMES | {"top_p": 0.99, "n_indent": 4}
VIM: dict[str, Any] = TEXTS | COMMON | TIMES | {"top_p": 0.9, "n_indent": 4, "stop": [], "response_fields": FIELDS}
AHEAD: dict[str, Any] = {
    # other files, to be read before anybody asks
    "input_prefix": "", "input_suffix": "", "input_extra": TEXTS["input_extra"], "prompt": "", "n_predict": 0,
    "samplers": [], "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1,
}  # fmt: skip
VIM_AHEAD = AHEAD | {"temperature": 0.0, "stream": False, "response_fields": [""]}
