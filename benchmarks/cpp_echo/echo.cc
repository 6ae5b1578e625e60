// The limit to compare with: gRPC's C++ server on the callback API, which neither batches nor runs any Python.
//
// echo REPLY_HEX: serves every method on a port of the system's choice, which it prints as {"port": N}, until its
// standard input ends. Each message on a stream is answered with REPLY, whose last 8 bytes are the message's own.

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

static std::string reply;
static const size_t kTagBytes = 8;

class Stream : public grpc::ServerGenericBidiReactor {
 public:
  Stream() { StartRead(&message_); }
  void OnReadDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::OK);
    grpc::Slice answer(reply.data(), reply.size());
    CopyTail(const_cast<uint8_t*>(answer.end()));
    answer_ = grpc::ByteBuffer(&answer, 1);
    StartWrite(&answer_);
  }
  void OnWriteDone(bool ok) override { ok ? StartRead(&message_) : Finish(grpc::Status::CANCELLED); }
  void OnDone() override { delete this; }

 private:
  void CopyTail(uint8_t* end) {  // the message may come in several pieces
    std::vector<grpc::Slice> pieces;
    message_.Dump(&pieces);
    size_t missing = kTagBytes;
    for (auto piece = pieces.rbegin(); piece != pieces.rend() && missing > 0; ++piece) {
      size_t bytes = std::min(missing, piece->size());
      std::copy_backward(piece->end() - bytes, piece->end(), end);
      end -= bytes;
      missing -= bytes;
    }
  }
  grpc::ByteBuffer message_, answer_;
};

class Service : public grpc::CallbackGenericService {
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override { return new Stream; }
};

int main(int argc, char** argv) {
  std::string hex = argc == 2 ? argv[1] : "";
  for (size_t i = 0; i + 1 < hex.size(); i += 2) reply.push_back(std::stoi(hex.substr(i, 2), nullptr, 16));
  if (reply.size() < kTagBytes) return std::cerr << "usage: echo REPLY_HEX, of 8 bytes or more\n", 2;
  Service service;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(-1);
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  auto server = builder.BuildAndStart();
  if (!server) return 1;
  std::cout << "{\"port\": " << port << "}" << std::endl;
  while (std::cin.get() != EOF) {
  }
  server->Shutdown(std::chrono::system_clock::now());
}
