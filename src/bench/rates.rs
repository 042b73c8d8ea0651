//! The rates of repeated rounds, and what they come to.

/// Units per second of each round, in the order of the rounds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rates {
    rounds: Vec<f64>,
}

impl Rates {
    pub(super) fn push(&mut self, rate: f64) {
        self.rounds.push(rate);
    }

    pub(super) fn rounds(&self) -> &[f64] {
        &self.rounds
    }

    /// The middle one; of an even number of rounds the mean of the middle two. NaN of no round, as for the others.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2))
    }

    pub(super) fn least(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(super) fn most(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::NAN, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_least_and_most() {
        let cases: [(&[f64], f64, f64, f64); 5] = [
            (&[7.0], 7.0, 7.0, 7.0),
            (&[2.0, 1.0], 1.5, 1.0, 2.0),
            (&[9.0, 1.0, 3.0], 3.0, 1.0, 9.0),
            (&[4.0, 8.0, 1.0, 2.0], 3.0, 1.0, 8.0),
            (&[5.0, 5.0, 100.0, 5.0, 1.0], 5.0, 1.0, 100.0),
        ];
        for (rounds, median, least, most) in cases {
            let mut rates = Rates::default();
            rounds.iter().for_each(|&rate| rates.push(rate));
            assert_eq!((rates.median(), rates.least(), rates.most()), (median, least, most), "{rounds:?}");
            assert_eq!(rates.rounds(), rounds);
        }
        let none = Rates::default();
        assert!(none.median().is_nan() && none.least().is_nan() && none.most().is_nan());
    }
}
