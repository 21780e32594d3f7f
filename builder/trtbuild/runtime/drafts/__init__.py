"""Speculative decoding: who proposes tokens, how many, and what the model that verifies them makes of it.

In reading order: `config` (what engine.json says), `draft` (a proposal, and the interface of who makes one),
`speculation` (how many tokens, for which sequences, and the counts), `verify` (from the logits of a step to accepted
tokens), `acceptance` (the rule for sampled tokens), then the drafters.
"""
