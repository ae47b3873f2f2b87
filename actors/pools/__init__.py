"""Learners and generators that outlive a step: started once per run and lent from step to step."""
