#!/usr/bin/env bash
# Ask with curl: health, models, an answer, a stream, and how many prompt tokens were handed over.
# Usage: curl.sh [URL]     (default http://127.0.0.1:8000, where `pd-launch up` listens)
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
ask=(curl --silent --show-error --fail --header 'Content-Type: application/json')

"${ask[@]}" "$url/health"; echo
model=$("${ask[@]}" "$url/v1/models" | grep --only-matching '"id":"[^"]*"' | head -n 1 | cut -d '"' -f 4)
"${ask[@]}" "$url/v1/completions" \
  --data '{"model": "'"$model"'", "prompt": "The KV cache is", "max_tokens": 16, "temperature": 0}'; echo
"${ask[@]}" --no-buffer "$url/v1/chat/completions" \
  --data '{"model": "'"$model"'", "max_tokens": 8, "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
"${ask[@]}" "$url/metrics" | grep '^pd_hand_off'
