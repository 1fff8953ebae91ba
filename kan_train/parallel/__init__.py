"""Process groups, and the parameters and layers that know how they are split over them; the identity where there are none."""
