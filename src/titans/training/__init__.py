"""Training: text and tokenizers, library baselines under one interface, the Trainer's set-up, comparisons.

The parts are imported from their own modules (`titans.training.text`, `.models`, `.config`, `.run`, `.compare`), so
that importing the package stays fast.
"""
