"""Programs that load an export and are asked, each in a process of its own: `answer(request) -> reply`.

A request has `model` (a folder or a file), `prompts` (the taught one first, if there is one), `taught` (whether),
`count`, `max_new_tokens`, `temperature`, `top_p`, `seed`, `greedy_tokens`, `text` and `threads`; to all but
transformers also `reference`, which is transformers' reply: so all compute from the same token ids. A reply has what
`Reply` names.
"""
