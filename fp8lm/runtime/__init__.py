"""What programs need of the machine they run on, below everything else in the package."""
