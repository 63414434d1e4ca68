"""Ask through the OpenAI client, whole and streamed.

Usage: python openai_client.py [BASE_URL]     (default http://127.0.0.1:8000/v1, where `pd-launch up` listens)
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="not needed")
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Hello, who are you?"}], max_tokens=32
)
print(answer.choices[0].message.content)
print(answer.usage)

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Tell me more."}], max_tokens=32, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
