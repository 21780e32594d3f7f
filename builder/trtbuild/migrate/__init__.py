"""`trtbuild migrate`: from an older deployment of TensorRT-LLM to a recipe.

In reading order: `legacy` (what was found), `source` and one reader for each form (`repository`, `engine_directory`,
`arguments`, `llm_document`, `package_recipe`), `fates` and `values` (the table ``_compat/legacy_names.toml``), `target`
(what the new runtime takes), `places` (the checkpoint), `translate` (settings to rows and fields), `extras`, `fit`
(values that must agree), `document` (the recipe's text), `run`.
"""
