"""Serving what an export made to OpenAI's clients, by llama.cpp or vLLM."""
