"""Random faults in random trainings: nothing is lost, and training goes on as if nothing had been."""
