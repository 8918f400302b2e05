// The family of functions from score to probability that the CPU engine solves rows of.

#ifndef FLASH_ENTMAX_SRC_CPU_CURVE_H_
#define FLASH_ENTMAX_SRC_CPU_CURVE_H_

#include <cmath>

namespace flash_entmax::cpu {

// The members with code of their own, and the rest.
enum class CurveKind {
  kSoftmax,    // m = 0
  kSquare,     // m = 1/2: 1.5-entmax, and 2-normmax
  kSparsemax,  // m = 1
  kGeneral,
};

// A curve with its threshold: p = factor·[1 − (shift + slope·δ)]₊^exponent, or
// factor·exp(−(shift + slope·δ)) for kSoftmax.
struct Level {
  double shift = 0.0;
  double slope = 1.0;
  double exponent = 1.0;
  double factor = 1.0;
};

// p = [1 − (m·c + slope·δ)]₊^exponent, exponent = 1/m; exp(−(c + δ)) at m = 0. See threshold-inl.h.
struct Curve {
  CurveKind kind = CurveKind::kSquare;
  double m = 0.5;
  double slope = 0.5;
  double exponent = 2.0;

  // α-entmax, any α > 0.
  static Curve Entmax(double alpha) { return Make(alpha - 1.0, alpha - 1.0); }

  // The curve whose threshold is that of α-normmax, α > 1: Σ [s − τ]₊^(α/(α−1)) = 1. Normmax's
  // probabilities are then [s − τ]₊^(1/(α−1)), normalised.
  static Curve NormmaxThreshold(double alpha) { return Make((alpha - 1.0) / alpha, 1.0); }

  // The solved curve at offset c.
  Level LevelAt(double c) const { return {m == 0.0 ? c : m * c, slope, exponent, 1.0}; }

  // Entries with δ ≥ Reach(c) are exact zeros wherever the solution is at or above c.
  double Reach(double c) const { return m > 0.0 ? (1.0 - m * c) / slope : HUGE_VAL; }

  // τ = slope·max − 1 + m·c, or the normaliser max + c at m = 0: what the API calls the threshold.
  double Threshold(double max, double c) const {
    return m == 0.0 ? max + c : max * slope + (m * c - 1.0);
  }

 private:
  static Curve Make(double m, double slope) {
    Curve curve{CurveKind::kGeneral, m, slope, 1.0 / m};
    if (m == 0.0) curve = {CurveKind::kSoftmax, 0.0, 1.0, 0.0};
    if (m == 0.5) curve.kind = CurveKind::kSquare;
    if (m == 1.0) curve.kind = CurveKind::kSparsemax;
    return curve;
  }
};

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_CURVE_H_
