// The plain convolution that XNOR-Net's speed-up is held against: float32, one product after the other, no SIMD when
// built with -O2 -fno-tree-vectorize. Its sums do not wait for each other: neighbouring pixels take turns.

// x is (channels, side + kernel - 1, side + kernel - 1), its border included; weights (outputs, channels, kernel,
// kernel); y (outputs, side, side).
extern "C" void plain_conv2d(const float* x, const float* weights, float* y, int channels, int outputs, int side,
                             int kernel) {
  const int padded = side + kernel - 1;
  for (int o = 0; o < outputs; ++o, y += side * side) {
    for (int i = 0; i < side * side; ++i) y[i] = 0;
    for (int c = 0; c < channels; ++c)
      for (int ky = 0; ky < kernel; ++ky)
        for (int kx = 0; kx < kernel; ++kx) {
          const float weight = *weights++;
          for (int row = 0; row < side; ++row) {
            const float* from = x + (c * padded + row + ky) * padded + kx;
            for (int column = 0; column < side; ++column) y[row * side + column] += weight * from[column];
          }
        }
  }
}
