"""The site's OpenAI-compatible API (see README.md). Importing this imports nothing heavy."""
