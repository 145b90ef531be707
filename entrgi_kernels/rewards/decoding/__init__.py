"""Running a reward's network in parts: the prompt once, the committed slots once, the last layer where it is read.

Nothing here knows what a reward is: ``sequences`` lays rows out, ``decoder`` runs a backbone on top of keys and values,
``savings`` finds out by trial what may be left out, ``causal`` is a language model's head, ``attention`` two products.
"""
