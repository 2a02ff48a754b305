// The CPU's kernels that torch lacks.
//
// GroupNorm, modulation, SiLU and dropout in one step, for activations with the channels last: (N, pixels, C).
//
//     z = x + pre                                   pre, scale, shift: (N, C), each optional
//     u = (1 + scale) (weight (z - mean) rstd + bias) + shift
//     y = keep (u sigmoid(u)) / keep_probability    or u alone, without activation
//
// A thread takes one sample, or some of its groups if there are fewer samples than threads. Statistics are in double,
// by chunks of rows that stay in the first-level cache (Chan et al. 1979), and never E[x^2] - E[x]^2.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kRows = 32;

using bf16 = uint16_t;

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float load(float value) { return value; }
inline float load(bf16 value) { return bits_to_float(uint32_t(value) << 16); }

inline void store(float& to, float value) { to = value; }
inline void store(bf16& to, float value) {
    // rounds to nearest, ties to even; a NaN of this file's arithmetic has zeros in its last bits, so it stays one
    const uint32_t bits = float_to_bits(value);
    to = bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sigmoid(float u) {
    // exp(-u) = 2^t = 2^n 2^r with |r| <= 1/2 and a polynomial for 2^r, relative error 1e-7: no call of the library, so
    // that compilers vectorise the loops
    float t = u * -1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    t = t > 126.0f ? 126.0f : t;
    const float shifted = t + 12582912.0f;  // 1.5 * 2^23: its last bits are n
    const float r = t - (shifted - 12582912.0f);
    float p = 0.00132647f;
    p = p * r + 0.00967151f;
    p = p * r + 0.05550734f;
    p = p * r + 0.24022242f;
    p = p * r + 0.69314698f;
    p = p * r + 1.0f;
    return 1.0f / (1.0f + bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23)));
}

// A vector of float or bfloat16.
struct Vector {
    const void* values;
    bool is_bf16;
    float operator[](int64_t i) const {
        return is_bf16 ? load(static_cast<const bf16*>(values)[i]) : static_cast<const float*>(values)[i];
    }
};

// The arguments of a call; null pointers stand for what is not given.
struct Problem {
    int64_t samples, pixels, channels, groups, threads, row, is_bf16, weight_is_bf16, act;
    double eps, keep_scale;
    const void *weight, *bias, *pre, *scale, *shift;  // (C), (C), and (N, C) with `row` values from sample to sample
    const uint8_t* keep;                              // (N, pixels, C)

    float modulation(const void* values, int64_t n, int64_t c) const {
        return values ? Vector{values, is_bf16 != 0}[n * row + c] : 0.0f;
    }

    int64_t blocks() const {  // parts of the channels that are whole groups, of 32 channels or more
        const int64_t most = std::min(groups, std::max<int64_t>(1, channels / 32));
        int64_t blocks = samples >= threads ? 1 : std::min(most, (threads + samples - 1) / samples);
        while (groups % blocks) --blocks;
        return blocks;
    }
};

// The channels [begin, end) of sample n, and u = slope x + offset, xhat = rstd x - center for each of them.
struct Part {
    int64_t n, begin, width;
    std::vector<float> slope, offset, rstd, center, gain;

    Part(const Problem& p, int64_t index, int64_t blocks, const float* mean, const float* inverse)
        : n(index / blocks), begin(index % blocks * (p.channels / blocks)), width(p.channels / blocks),
          slope(width), offset(width), rstd(width), center(width), gain(width) {
        const Vector weight{p.weight, p.weight_is_bf16 != 0}, bias{p.bias, p.weight_is_bf16 != 0};
        const int64_t per_group = p.channels / p.groups;
        for (int64_t i = 0; i < width; ++i) {
            const int64_t c = begin + i, g = n * p.groups + c / per_group;
            const float factor = 1.0f + p.modulation(p.scale, n, c);
            rstd[i] = inverse[g];
            center[i] = (mean[g] - p.modulation(p.pre, n, c)) * rstd[i];
            gain[i] = weight[c] * factor;
            slope[i] = gain[i] * rstd[i];
            offset[i] = bias[c] * factor + p.modulation(p.shift, n, c) - gain[i] * center[i];
        }
    }
};

template <typename T>
void statistics(const Problem& p, const T* x, int64_t index, int64_t blocks, float* mean, float* inverse) {
    const int64_t n = index / blocks, width = p.channels / blocks, begin = index % blocks * width;
    const int64_t per_group = p.channels / p.groups;
    std::vector<double> means(width, 0.0), squares(width, 0.0);
    std::vector<float> sum(width), square(width);
    for (int64_t row = 0; row < p.pixels; row += kRows) {
        const int64_t count = std::min(kRows, p.pixels - row);
        const T* first = x + (n * p.pixels + row) * p.channels + begin;
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(square.begin(), square.end(), 0.0f);
        float *s = sum.data(), *q = square.data();
        for (int64_t r = 0; r < count; ++r)
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) s[i] += load(first[r * p.channels + i]);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) s[i] /= count;
        for (int64_t r = 0; r < count; ++r)
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const float d = load(first[r * p.channels + i]) - s[i];
                q[i] += d * d;
            }
        const double share = double(count) / (row + count);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const double delta = s[i] - means[i];
            means[i] += delta * share;
            squares[i] += q[i] + delta * delta * share * row;
        }
    }
    for (int64_t i = 0; i < width; i += per_group) {
        double middle = 0.0, total = 0.0;
        if (p.pre)
            for (int64_t j = i; j < i + per_group; ++j) means[j] += p.modulation(p.pre, n, begin + j);
        for (int64_t j = i; j < i + per_group; ++j) middle += means[j] / per_group;
        for (int64_t j = i; j < i + per_group; ++j)
            total += squares[j] + p.pixels * (means[j] - middle) * (means[j] - middle);
        const int64_t g = n * p.groups + (begin + i) / per_group;
        mean[g] = float(middle);
        inverse[g] = float(1.0 / std::sqrt(total / (double(p.pixels) * per_group) + p.eps));
    }
}

template <typename T, bool Act, bool Keep>
void apply(const Problem& p, const Part& part, const T* x, T* y) {
    const float *a = part.slope.data(), *b = part.offset.data(), k = float(p.keep_scale);
    for (int64_t row = 0; row < p.pixels; ++row) {
        const int64_t at = (part.n * p.pixels + row) * p.channels + part.begin;
#pragma omp simd
        for (int64_t i = 0; i < part.width; ++i) {
            float u = a[i] * load(x[at + i]) + b[i];
            if (Act) u *= sigmoid(u);
            if (Keep) u = p.keep[at + i] ? u * k : 0.0f;
            store(y[at + i], u);
        }
    }
}

// Run part(0), ..., part(count - 1), by several threads if it pays. No clause of OpenMP may say how many, or that it is
// one: a team of another size than torch's ends torch's threads, and its next operation starts them again.
template <typename F>
void run_parts(const Problem& p, int64_t count, F part) {
    if (p.threads == 1) {
        for (int64_t index = 0; index < count; ++index) part(index);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t index = 0; index < count; ++index) part(index);
}

template <typename T>
void forward(const Problem& p, const T* x, T* y, float* mean, float* inverse) {
    const int64_t blocks = p.blocks();
    run_parts(p, p.samples * blocks, [&](int64_t index) {
        statistics(p, x, index, blocks, mean, inverse);
        const Part part(p, index, blocks, mean, inverse);
        if (p.act && p.keep) apply<T, true, true>(p, part, x, y);
        else if (p.act) apply<T, true, false>(p, part, x, y);
        else apply<T, false, false>(p, part, x, y);
    });
}

// d/du of the activation, times the incoming gradient
template <bool Act, bool Keep>
inline float gradient(float u, float dy, uint8_t keep, float k) {
    if (Keep) dy = keep ? dy * k : 0.0f;
    if (!Act) return dy;
    const float s = sigmoid(u);
    return dy * s * (1.0f + u * (1.0f - s));
}

template <typename T, bool Act, bool Keep>
void backward_part(const Problem& p, const Part& part, const T* x, const T* dy, T* dx, float* du_sum, float* dux_sum,
                   float* x_sum) {
    const int64_t width = part.width, per_group = p.channels / p.groups;
    const float *a = part.slope.data(), *b = part.offset.data(), *rstd = part.rstd.data(), *center = part.center.data();
    const float k = float(p.keep_scale);
    std::vector<float> first(width), second(width), third(width);
    std::vector<double> sums(3 * width, 0.0);
    for (int64_t row = 0; row < p.pixels; row += kRows) {
        const int64_t count = std::min(kRows, p.pixels - row);
        std::fill(first.begin(), first.end(), 0.0f);
        std::fill(second.begin(), second.end(), 0.0f);
        std::fill(third.begin(), third.end(), 0.0f);
        float *f = first.data(), *s = second.data(), *t = third.data();
        for (int64_t r = row; r < row + count; ++r) {
            const int64_t at = (part.n * p.pixels + r) * p.channels + part.begin;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const float value = load(x[at + i]), xhat = rstd[i] * value - center[i];
                const uint8_t keep = Keep ? p.keep[at + i] : 1;
                const float du = gradient<Act, Keep>(a[i] * value + b[i], load(dy[at + i]), keep, k);
                if (std::is_same_v<T, float>) store(dx[at + i], du);  // exact, so not computed again below
                f[i] += du;
                s[i] += du * xhat;
                t[i] += xhat;
            }
        }
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            sums[i] += f[i];
            sums[width + i] += s[i];
            sums[2 * width + i] += t[i];
        }
    }
    std::vector<float> constant(width), factor(width);
    for (int64_t i = 0; i < width; i += per_group) {
        double one = 0.0, two = 0.0;
        for (int64_t j = i; j < i + per_group; ++j) {
            one += part.gain[j] * sums[j];
            two += part.gain[j] * sums[width + j];
        }
        const double size = double(p.pixels) * per_group;
        for (int64_t j = i; j < i + per_group; ++j) {
            constant[j] = float(one / size * rstd[j]);
            factor[j] = float(two / size * rstd[j]);
        }
    }
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const int64_t at = part.n * p.channels + part.begin + i;
        du_sum[at] = float(sums[i]);
        dux_sum[at] = float(sums[width + i]);
        x_sum[at] = float(a[i] * sums[i] - p.pixels * double(constant[i]) - factor[i] * sums[2 * width + i]);
    }
    const float *m = constant.data(), *v = factor.data();
    for (int64_t r = 0; r < p.pixels; ++r) {
        const int64_t at = (part.n * p.pixels + r) * p.channels + part.begin;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float value = load(x[at + i]), xhat = rstd[i] * value - center[i];
            const uint8_t keep = Keep ? p.keep[at + i] : 1;
            const float du = std::is_same_v<T, float> ? load(dx[at + i])
                                                      : gradient<Act, Keep>(a[i] * value + b[i], load(dy[at + i]), keep, k);
            store(dx[at + i], a[i] * du - m[i] - xhat * v[i]);
        }
    }
}

// gradients: of weight and bias (2, C), then of pre, or of scale and shift, (2, N, C)
template <typename T>
void backward(const Problem& p, const T* x, const T* dy, const float* mean, const float* inverse, T* dx,
              float* gradients) {
    const int64_t blocks = p.blocks(), size = p.samples * p.channels;
    std::vector<float> sums(3 * size);
    float *f = sums.data(), *s = f + size, *t = s + size;
    run_parts(p, p.samples * blocks, [&](int64_t index) {
        const Part part(p, index, blocks, mean, inverse);
        if (p.act && p.keep) backward_part<T, true, true>(p, part, x, dy, dx, f, s, t);
        else if (p.act) backward_part<T, true, false>(p, part, x, dy, dx, f, s, t);
        else backward_part<T, false, false>(p, part, x, dy, dx, f, s, t);
    });
    const Vector weight{p.weight, p.weight_is_bf16 != 0}, bias{p.bias, p.weight_is_bf16 != 0};
    float *dweight = gradients, *dbias = gradients + p.channels, *first = gradients + 2 * p.channels;
    std::fill(gradients, first, 0.0f);
    for (int64_t n = 0; n < p.samples; ++n)
        for (int64_t c = 0; c < p.channels; ++c) {
            const int64_t at = n * p.channels + c;
            const float factor = 1.0f + p.modulation(p.scale, n, c);
            dweight[c] += factor * s[at];
            dbias[c] += factor * f[at];
            first[at] = p.scale ? weight[c] * s[at] + bias[c] * f[at] : t[at];
            first[size + at] = f[at];
        }
}

}  // namespace

extern "C" {

// 8 bytes that change with each of `nbytes` bytes: 256 lanes of 32 bits, which take a word in turn, then mixed
void digest(const void* data, int64_t nbytes, void* out) {
    constexpr int kLanes = 256;
    uint32_t lanes[kLanes] = {};
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    for (; nbytes > 0; bytes += 4 * kLanes, nbytes -= 4 * kLanes) {
        uint32_t words[kLanes] = {};
        std::memcpy(words, bytes, std::min<int64_t>(nbytes, 4 * kLanes));
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t mixed = (lanes[i] ^ words[i]) * 0x9E3779B1u;
            lanes[i] = mixed ^ (mixed >> 15);  // without it, the signs of two values would cancel
        }
    }
    uint64_t mixed = 0xcbf29ce484222325u;
    for (uint32_t lane : lanes) mixed = (mixed ^ lane) * 0x100000001b3u;
    std::memcpy(out, &mixed, 8);
}


// y (N, pixels, C); statistics: mean and inverse standard deviation (2, N, groups)
void norm_forward(const Problem* p, const void* x, void* y, float* statistics) {
    float* inverse = statistics + p->samples * p->groups;
    if (p->is_bf16) forward(*p, static_cast<const bf16*>(x), static_cast<bf16*>(y), statistics, inverse);
    else forward(*p, static_cast<const float*>(x), static_cast<float*>(y), statistics, inverse);
}

// dx (N, pixels, C); gradients (2 + 2 N, C)
void norm_backward(const Problem* p, const void* x, const void* dy, const float* statistics, void* dx,
                   float* gradients) {
    const float* inverse = statistics + p->samples * p->groups;
    if (p->is_bf16)
        backward(*p, static_cast<const bf16*>(x), static_cast<const bf16*>(dy), statistics, inverse,
                 static_cast<bf16*>(dx), gradients);
    else
        backward(*p, static_cast<const float*>(x), static_cast<const float*>(dy), statistics, inverse,
                 static_cast<float*>(dx), gradients);
}
}
