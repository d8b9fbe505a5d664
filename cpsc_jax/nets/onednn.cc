// Convolutions of oneDNN as foreign functions of XLA, for CPUs.
//
// A call is split over the batch into one chunk per thread of XLA's own pool; within a chunk oneDNN runs on one thread.
// No second pool competes for the cores, and the order of all sums depends on the number of threads alone. Under
// jax.vmap a call has many convolutions of one shape: where they are at least as many as threads, each has one thread.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dnnl.hpp"
#include "xla/ffi/api/ffi.h"

extern "C" void omp_set_num_threads(int);

namespace {

namespace ffi = xla::ffi;
using dnnl::algorithm;
using dnnl::memory;
using dnnl::prop_kind;
using Dims = ffi::Span<const int64_t>;
using Numbers = std::vector<int64_t>;

enum class Kind : int64_t { kForward, kInputGradient, kWeightGradient };

constexpr size_t kMostPlans = 4096;  // plans are forgotten above that
constexpr double kFewFlops = 2e6;    // calls below that are not worth a second thread
constexpr int kSpins = 20000;        // some 0.5 ms; waking a thread that sleeps takes as long as a small convolution
constexpr size_t kAlignment = 64;

const dnnl::engine& Cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& Stream() {
  thread_local dnnl::stream stream(Cpu());
  return stream;
}

// Memory of one thread that grows to the largest size ever asked for.
class Buffer {
 public:
  void* AtLeast(size_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + kAlignment - 1) / kAlignment * kAlignment;
      data_ = std::aligned_alloc(kAlignment, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  ~Buffer() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

void* Scratch(size_t size) {
  thread_local Buffer buffer;
  return size ? buffer.AtLeast(size) : nullptr;
}

memory::data_type TypeOf(ffi::DataType type) {
  if (type == ffi::DataType::F32) return memory::data_type::f32;
  if (type == ffi::DataType::BF16) return memory::data_type::bf16;
  throw std::invalid_argument("oneDNN convolutions take float32 and bfloat16");
}

struct Shape {
  memory::data_type type;
  Numbers x, w, y;        // NHWC, HWIO, NHWC
  Numbers strides, edge;  // (height, width), (top, bottom, left, right)

  double Flops() const { return 2.0 * y[0] * y[1] * y[2] * w[0] * w[1] * w[2] * w[3]; }
};

// How a convolution of `images` images is computed: a primitive of oneDNN and the layouts it asks for.
struct Plan {
  Plan(Kind kind, const Shape& s, int64_t images) {
    const memory::dims x{images, s.x[3], s.x[1], s.x[2]}, w{s.w[3], s.w[2], s.w[0], s.w[1]};
    const memory::dims y{images, s.y[3], s.y[1], s.y[2]};
    const memory::dims low{s.edge[0], s.edge[2]}, high{s.edge[1], s.edge[3]};
    using tag = memory::format_tag;
    // Sums over the batch stay in float32 until they are whole.
    const auto w_type = kind == Kind::kWeightGradient ? memory::data_type::f32 : s.type;
    const memory::desc dx(x, s.type, tag::nhwc), dy(y, s.type, tag::nhwc), any(w, s.type, tag::any);
    const memory::desc any_sum(w, w_type, tag::any);
    given = memory::desc(w, s.type, tag::hwio);
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::convolution_forward::primitive_desc forward(
        Cpu(), prop_kind::forward_training, algorithm::convolution_direct, dx, any, dy, s.strides, low, high, attr);
    if (kind == Kind::kForward) {
      primitive = dnnl::convolution_forward(forward);
      wanted = forward.weights_desc(), input = dx, output = dy, scratchpad = forward.scratchpad_desc();
    } else if (kind == Kind::kInputGradient) {
      const dnnl::convolution_backward_data::primitive_desc backward(
          Cpu(), algorithm::convolution_direct, dx, any, dy, s.strides, low, high, forward, attr);
      primitive = dnnl::convolution_backward_data(backward);
      wanted = backward.weights_desc(), input = dy, output = dx, scratchpad = backward.scratchpad_desc();
    } else {
      const dnnl::convolution_backward_weights::primitive_desc backward(
          Cpu(), algorithm::convolution_direct, dx, any_sum, dy, s.strides, low, high, forward, attr);
      primitive = dnnl::convolution_backward_weights(backward);
      wanted = backward.diff_weights_desc(), input = dx, output = dy, scratchpad = backward.scratchpad_desc();
    }
    if (wanted != given) {
      reorder = kind == Kind::kWeightGradient
                    ? dnnl::reorder(dnnl::reorder::primitive_desc(Cpu(), wanted, Cpu(), given, attr))
                    : dnnl::reorder(dnnl::reorder::primitive_desc(Cpu(), given, Cpu(), wanted, attr));
    }
  }

  dnnl::primitive primitive;
  dnnl::reorder reorder;                    // of the weights, where `wanted` is not `given`
  memory::desc given, wanted;               // of the weights: as XLA holds them, as the primitive takes or gives them
  memory::desc input, output, scratchpad;   // weight gradients: x and dy
};

std::shared_ptr<const Plan> FindPlan(Kind kind, const Shape& s, int64_t images) {
  static std::mutex mutex;
  static std::map<Numbers, std::shared_ptr<const Plan>> plans;
  Numbers key{static_cast<int64_t>(kind), static_cast<int64_t>(s.type), images};
  for (const Numbers* part : {&s.x, &s.w, &s.y, &s.strides, &s.edge}) key.insert(key.end(), part->begin(), part->end());
  const std::lock_guard<std::mutex> lock(mutex);
  if (auto found = plans.find(key); found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = std::make_shared<const Plan>(kind, s, images);
}

// Calls work(0) ... work(count - 1) on the threads of the pool and returns when all are done.
//
// The caller takes its share and never waits for a task that has not begun, so that calls on all threads at once
// cannot wait for each other.
void InParallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> work) {
  struct Shared {
    std::function<void(int64_t)> work;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::exception_ptr failure;
    std::mutex mutex;
    std::condition_variable all_done;

    void Help() {
      for (int64_t i = next++; i < count; i = next++) {
        std::exception_ptr failed;
        try {
          work(i);
        } catch (...) {
          failed = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(mutex);
        if (failed) failure = failed;
        if (++done == count) all_done.notify_all();
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->count = count;
  for (int64_t i = 1; i < count; ++i) pool.Schedule([shared] { shared->Help(); });
  shared->Help();
  for (int i = 0; shared->done < count && i < kSpins; ++i) __builtin_ia32_pause();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == shared->count; });
  if (shared->failure) std::rethrow_exception(shared->failure);
}

void Execute(const dnnl::primitive& primitive, std::unordered_map<int, memory> arguments, const memory::desc& scratch) {
  omp_set_num_threads(1);  // of this thread
  if (scratch.get_size()) arguments.insert({DNNL_ARG_SCRATCHPAD, memory(scratch, Cpu(), Scratch(scratch.get_size()))});
  primitive.execute(Stream(), arguments);
  Stream().wait();
}

void Reorder(const Plan& plan, const memory& from, const memory& to) {
  Execute(plan.reorder, {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}}, memory::desc());
}

char* Offset(void* data, int64_t images, const Numbers& shape, memory::data_type type) {
  const int64_t size = memory::data_type_size(type);
  return static_cast<char*>(data) + images * shape[1] * shape[2] * shape[3] * size;
}

Numbers Copy(Dims dims) { return Numbers(dims.begin(), dims.end()); }

void Convolve(ffi::ThreadPool& pool, int64_t most, Kind kind, const Shape& s, void* a, void* b, void* c) {
  const int64_t images = s.x[0];
  const int64_t threads = s.Flops() < kFewFlops ? 1 : std::clamp<int64_t>(most, 1, images);
  const auto first = [=](int64_t chunk) { return images * chunk / threads; };
  const auto plan_of = [&](int64_t chunk) { return FindPlan(kind, s, first(chunk + 1) - first(chunk)); };

  if (kind == Kind::kWeightGradient) {
    const auto plan = plan_of(0);
    const size_t size = (plan->wanted.get_size() + kAlignment - 1) / kAlignment * kAlignment;
    thread_local Buffer buffer;
    char* sums = static_cast<char*>(buffer.AtLeast(size * threads));
    InParallel(pool, threads, [&](int64_t i) {
      const auto own = plan_of(i);
      if (own->wanted != plan->wanted) throw std::runtime_error("oneDNN chose two layouts for one convolution");
      memory x(own->input, Cpu(), Offset(a, first(i), s.x, s.type)), dy(own->output, Cpu(), Offset(b, first(i), s.y, s.type));
      memory dw(own->wanted, Cpu(), sums + i * size);
      Execute(own->primitive, {{DNNL_ARG_SRC, x}, {DNNL_ARG_DIFF_DST, dy}, {DNNL_ARG_DIFF_WEIGHTS, dw}}, own->scratchpad);
    });
    float* total = reinterpret_cast<float*>(sums);
    for (int64_t i = 1; i < threads; ++i) {
      const float* part = reinterpret_cast<const float*>(sums + i * size);
      for (size_t j = 0; j < plan->wanted.get_size() / sizeof(float); ++j) total[j] += part[j];
    }
    const memory from(plan->wanted, Cpu(), sums), to(plan->given, Cpu(), c);
    if (plan->reorder) {
      Reorder(*plan, from, to);
    } else {
      std::copy_n(sums, plan->given.get_size(), static_cast<char*>(c));
    }
    return;
  }

  const bool forward = kind == Kind::kForward;
  const Numbers &in = forward ? s.x : s.y, &out = forward ? s.y : s.x;
  thread_local Buffer buffer;
  const auto plan = plan_of(0);
  memory w(plan->given, Cpu(), b);
  if (plan->reorder) {
    memory reordered(plan->wanted, Cpu(), buffer.AtLeast(plan->wanted.get_size()));
    Reorder(*plan, w, reordered);
    w = reordered;
  }
  InParallel(pool, threads, [&](int64_t i) {
    const auto own = plan_of(i);
    if (own->wanted != plan->wanted) throw std::runtime_error("oneDNN chose two layouts for one convolution");
    memory from(own->input, Cpu(), Offset(a, first(i), in, s.type)), to(own->output, Cpu(), Offset(c, first(i), out, s.type));
    Execute(own->primitive,
            {{forward ? DNNL_ARG_SRC : DNNL_ARG_DIFF_DST, from}, {DNNL_ARG_WEIGHTS, w}, {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_SRC, to}},
            own->scratchpad);
  });
}

// One argument of a call under jax.vmap: axes in front of the four of a convolution, of size 1 where it has no such axis.
struct Stacked {
  Stacked(ffi::AnyBuffer buffer, size_t front) : data(static_cast<char*>(buffer.untyped_data())) {
    const Numbers dims = Copy(buffer.dimensions());
    if (dims.size() != front + 4) throw std::invalid_argument("arguments of a convolution differ in their axes");
    axes.assign(dims.begin(), dims.begin() + front), shape.assign(dims.begin() + front, dims.end());
    bytes = memory::data_type_size(TypeOf(buffer.element_type()));
    for (int64_t size : shape) bytes *= size;
  }

  int64_t Count() const {
    int64_t count = 1;
    for (int64_t size : axes) count *= size;
    return count;
  }

  // Where the convolution of this number begins, counted along the axes `all`.
  char* At(int64_t number, const Numbers& all) const {
    int64_t place = 0, step = 1;
    for (size_t i = axes.size(); i-- > 0; number /= all[i], step *= axes[i])
      if (axes[i] > 1) place += number % all[i] * step;
    return data + place * bytes;
  }

  char* data;
  Numbers axes, shape;
  int64_t bytes;
};

void ConvolveAll(ffi::ThreadPool& pool, Kind kind, Shape s, const Stacked& a, const Stacked& b, const Stacked& c) {
  const int64_t count = c.Count(), threads = std::max<int64_t>(pool.num_threads(), 1);
  if (kind != Kind::kWeightGradient && b.Count() == 1 && a.Count() == count) {  // the same weights: one larger batch
    s.x[0] *= count, s.y[0] *= count;
    return Convolve(pool, threads, kind, s, a.data, b.data, c.data);
  }
  const auto one = [&](int64_t number, int64_t most) {
    Convolve(pool, most, kind, s, a.At(number, c.axes), b.At(number, c.axes), c.At(number, c.axes));
  };
  if (count >= threads && count > 1 && count * s.Flops() >= kFewFlops) {
    InParallel(pool, count, [&](int64_t number) { one(number, 1); });
  } else {
    for (int64_t number = 0; number < count; ++number) one(number, threads);
  }
}

template <Kind kind>
ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> c, Dims strides,
                Dims padding) {
  try {
    if (c->dimensions().size() < 4)
      throw std::invalid_argument("a convolution takes (N, H, W, I) and (kh, kw, I, O)");
    const size_t front = c->dimensions().size() - 4;
    const Stacked left(a, front), right(b, front), out(*c, front);
    Shape s{TypeOf(a.element_type()), left.shape, right.shape, out.shape, Copy(strides), Copy(padding)};
    if (kind == Kind::kInputGradient) s.x = out.shape, s.y = left.shape;
    if (kind == Kind::kWeightGradient) s.w = out.shape, s.y = right.shape;
    if (s.strides.size() != 2 || s.edge.size() != 4)
      throw std::invalid_argument("a convolution takes two strides and four paddings");
    ConvolveAll(pool, kind, s, left, right, out);
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("convolution by oneDNN: ") + e.what());
  }
  return ffi::Error::Success();
}

#define CPSC_HANDLER(name, kind)                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, Call<kind>,                          \
                                ffi::Ffi::Bind()                           \
                                    .Ctx<ffi::ThreadPool>()                \
                                    .Arg<ffi::AnyBuffer>()                 \
                                    .Arg<ffi::AnyBuffer>()                 \
                                    .Ret<ffi::AnyBuffer>()                 \
                                    .Attr<ffi::Span<const int64_t>>("strides") \
                                    .Attr<ffi::Span<const int64_t>>("padding"))

}  // namespace

CPSC_HANDLER(cpsc_convolution, Kind::kForward);
CPSC_HANDLER(cpsc_convolution_input_gradient, Kind::kInputGradient);
CPSC_HANDLER(cpsc_convolution_weight_gradient, Kind::kWeightGradient);

// Whether this processor computes convolutions of float32 (bits = 32) or bfloat16 (bits = 16) with vector instructions.
extern "C" int cpsc_supports(int bits) {
  try {
    const Shape s{bits == 32 ? memory::data_type::f32 : memory::data_type::bf16,
                  {2, 8, 8, 16}, {3, 3, 16, 16}, {2, 8, 8, 16}, {1, 1}, {1, 1, 1, 1}};
    for (Kind kind : {Kind::kForward, Kind::kInputGradient, Kind::kWeightGradient}) Plan(kind, s, 2);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}
