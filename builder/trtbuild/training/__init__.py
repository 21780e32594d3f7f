"""Heads of Medusa and drafts of EAGLE-3, trained for a checkpoint with ModelOpt; runs in a child process."""
