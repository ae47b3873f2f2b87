"""Learners and generators that outlive a step: started once per run, lent from step to step."""
