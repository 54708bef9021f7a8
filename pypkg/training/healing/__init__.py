"""What a run does about steps that went wrong: it goes back, leaves out samples, keeps a ledger."""
