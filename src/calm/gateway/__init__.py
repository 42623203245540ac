"""The door: HTTP in OpenAI's shape outside, `Ask`s and replies inside."""
