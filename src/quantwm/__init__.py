"""How few bits can a world model run on and still plan?"""
