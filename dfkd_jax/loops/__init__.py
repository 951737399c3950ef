"""The loops: what each kind of run does, and the session that lets it be killed and continued."""
