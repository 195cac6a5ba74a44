"""recording"""
def observing(): pass
def record(): pass
